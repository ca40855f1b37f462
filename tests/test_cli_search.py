"""`polylens search`: outcomes, exit codes, one clear sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

QUICK = [
    "probe.texts_per_language=4", "train.rows=4", "train.batch_size=2", "train.epochs=1",
    "evaluate.rows=4", "--development-rows", "4", "--token-budget", "512",
]  # fmt: skip


def test_a_search_ends_by_saying_what_it_found(run: Any, taught_folder: Path) -> None:
    command = [
        "search", "--model", taught_folder, "-l", "sw", "--trials", 2, "--strength", "0.5,1",
        "--vary", "train.layers=[1, 2]", "--out", "found", *QUICK,
    ]  # fmt: skip
    code, out, err = run(*command)
    assert code == 0, err
    assert "Best of 2 trials" in out
    assert "found/best.yaml" in out
    assert "trial 1 (" in err
    code, out, _ = run(*command, "--json", "-q")
    assert code == 0
    assert json.loads(out)["best"]["report"]["holds"] is True


def test_harm_everywhere_ends_in_exit_code_3(run: Any, taught_folder: Path) -> None:
    code, out, err = run(
        "search", "--model", taught_folder, "-l", "sw", "--trials", 1, "--strength", "1",
        "--vary", "train.learning_rate=[0.3]", "train.learning_rate=0.3", "train.retain_weight=0",
        "--out", "found", *QUICK,
    )  # fmt: skip
    assert code == 3
    assert "No setting can be used: the gate fails" in " ".join(err.split())
    assert "found/search.html" in out
    assert not Path("found/best.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "train.epoch=[1]"], "unknown key train.epoch, did you mean 'epochs'?"),
        (["--vary", "train.epochs={low: 5, high: 9}"], "train.epochs is 1, outside"),
        (["--vary", "train.layers=[2, 9]"], "train.layers must be between 1 and 4"),
        (["--vary", "space.yaml"], "--vary must be KEY=RANGE, got 'space.yaml'"),
        (["--space", "none.yaml"], "must be a readable YAML file"),
        (["--strength", "much"], "--strength must be numbers by commas"),
        (["--strength", "0"], "strengths above 0"),
        (["--development-rows", "95"], "lower --development-rows"),
        (["--out", "used"], "holds other files"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    run: Any, tiny_folder: Path, arguments: list[str], message: str
) -> None:
    Path("used").mkdir()
    Path("used/thesis.tex").write_text("mine")
    code, out, err = run("search", "--model", tiny_folder, "-l", "sw", *QUICK, *arguments)
    assert message in " ".join(err.split())
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert os.listdir() == ["used"]
    assert os.listdir("used") == ["thesis.tex"]


def test_without_optuna_it_is_told_how_to_get_it(
    run: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "polylens.search.study", raising=False)
    code, _, err = run("search", "--model", tiny_folder, "-l", "sw", *QUICK)
    assert code == 2
    assert "pip install 'polylens[search]'" in " ".join(err.split())
    assert os.listdir() == []
