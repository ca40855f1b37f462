"""Answers at a strength are those of the model with that much of its delta."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_jobs import SETTINGS

from polylens.config import RunConfig, load_config
from polylens.errors import PolyLensError, UsageError
from polylens.evaluation.generation import generate_answers
from polylens.models import load_model
from polylens.models.loading import LanguageModel
from polylens.prompts import choose_format
from polylens.run_folder import RunFolder
from polylens.studio.dial import Dial
from polylens.studio.looking import look_into_model
from test_crown import random_delta

PROMPT = "ما هو المطر؟"


@pytest.fixture
def model(tiny_folder: Path) -> LanguageModel:
    return load_model(tiny_folder)


@pytest.fixture
def config(tiny_folder: Path) -> RunConfig:
    return load_config(None, {**SETTINGS, "model": str(tiny_folder)})


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path, model: LanguageModel) -> RunFolder:
    folder = RunFolder(tmp_path / "first")
    look_into_model(str(tiny_folder), "sw", "en", n_texts=4).subspaces.save(folder.subspaces)
    random_delta(model).save(folder.delta)
    return folder


def test_the_dial_is_the_deltas_strength(
    folder: RunFolder, config: RunConfig, model: LanguageModel
) -> None:
    delta = random_delta(model)
    ids = choose_format(model.tokenizer).encode(model.tokenizer, [PROMPT], 999).ids
    found = {}
    with Dial().open(folder, config) as opened:
        for strength in (0.0, 0.5, 2.0, 0.0):
            found[strength] = opened.reply(PROMPT, strength=strength, max_new_tokens=12).answer
            with delta.applied(model.structure, strength):
                (wanted,) = generate_answers(model, ids, max_new_tokens=12)
            assert found[strength] == wanted
    assert len(set(found.values())) > 1


def test_steering_adds_to_it_and_goes_again(folder: RunFolder, config: RunConfig) -> None:
    with Dial().open(folder, config) as opened:
        plain = opened.reply(PROMPT, strength=1, max_new_tokens=12)
        pushed = opened.reply(PROMPT, strength=1, max_new_tokens=12, towards="sw", push=30.0)
        assert pushed != plain
        assert opened.reply(PROMPT, strength=1, max_new_tokens=12, towards="sw", push=0) == plain
        with pytest.raises(PolyLensError, match="xx"):
            opened.reply(PROMPT, strength=1, max_new_tokens=12, towards="xx", push=1)
        assert opened.reply(PROMPT, strength=1, max_new_tokens=12) == plain


def test_a_run_is_loaded_once_and_anew_when_it_changes(
    folder: RunFolder, config: RunConfig, model: LanguageModel
) -> None:
    dial = Dial()
    with dial.open(folder, config) as first:
        pass
    with dial.open(folder, config) as again:
        assert again is first
    random_delta(model).save(folder.delta)
    with dial.open(folder, config) as changed:
        assert changed is not first
    dial.close()
    with dial.open(folder, config) as anew:
        assert anew is not changed


def test_what_cannot_be_answered_is_said(folder: RunFolder, config: RunConfig) -> None:
    with Dial().open(folder, config) as opened:
        for prompt, longest in (("", 4), (" \n", 4), ("x", 0)):
            with pytest.raises(UsageError):
                opened.reply(prompt, strength=1, max_new_tokens=longest)
    folder.delta.unlink()
    with pytest.raises(UsageError, match="first has not"), Dial().open(folder, config):
        pass
