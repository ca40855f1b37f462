"""Candidates trained by Ray's workers are those trained here; Ray is an extra."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from polylens.config import TrainSettings
from polylens.corpora import starter_corpus
from polylens.errors import DistributedError, MissingExtraError
from polylens.models.loading import load_model
from polylens.steps import probe, train
from polylens.subspaces import Subspaces
from polylens.workers import train_on_workers

SETTINGS = [TrainSettings(max_tokens=512, layers=layers, epochs=1) for layers in (1, 2, 3)]


@pytest.fixture
def subspaces(tiny_folder: Path) -> Subspaces:
    corpus = starter_corpus().limit(4).to_corpus()
    return probe(load_model(tiny_folder), corpus, languages=("en", "sw"))


def test_without_ray_the_error_names_the_extra(
    tiny_folder: Path, subspaces: Subspaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'polylens\[ray\]'"):
        train_on_workers(str(tiny_folder), subspaces, starter_corpus(), SETTINGS, tmp_path)


@pytest.mark.slow
def test_workers_train_what_is_trained_here_and_go_on_where_they_were(
    tiny_folder: Path, subspaces: Subspaces, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    corpus = starter_corpus().limit(5)
    here = train(load_model(tiny_folder), subspaces, corpus, settings=SETTINGS)
    found = train_on_workers(str(tiny_folder), subspaces, corpus, SETTINGS, tmp_path)
    for mine, theirs in zip(here, found, strict=True):
        assert mine.layers == theirs.layers
        for name, change in mine.changes.items():
            assert (change - theirs.changes[name]).norm() <= 1e-3 * change.norm(), name
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "candidate-001.safetensors").unlink()
    train_on_workers(str(tiny_folder), subspaces, corpus, SETTINGS, tmp_path)
    again = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {name for name in again if again[name] != times[name]} == {"candidate-001.safetensors"}


@pytest.mark.slow
def test_a_candidate_that_fails_is_named_and_the_others_are_kept(
    tiny_folder: Path, subspaces: Subspaces, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    wild = SETTINGS[0].model_copy(update={"learning_rate": 1e6, "epochs": 8})
    with pytest.raises(DistributedError, match="candidate 1 failed"):
        train_on_workers(
            str(tiny_folder),
            subspaces,
            starter_corpus().limit(5),
            [SETTINGS[0], wild],
            tmp_path,
            n_workers=1,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["candidate-000.safetensors"]
