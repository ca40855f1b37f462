"""`polylens steer`: answers beside the untouched model's, figures by strength, clear refusals."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from polylens.config import RunConfig, dump_yaml
from polylens.models.loading import LanguageModel, load_model
from polylens.subspaces import Subspaces, probe_subspaces
from tiny import HIDDEN_SIZE, N_LAYERS, save_tiny

PUSH = ["--towards", "sw", "--layers", "1-2", "--max-new-tokens", "3"]


def make_subspaces(model: LanguageModel, name: str, **changes: Any) -> Subspaces:
    generator = torch.Generator().manual_seed(2)
    shape = (3, N_LAYERS + 1, HIDDEN_SIZE)
    pooled = {k: 5 * torch.randn(shape, generator=generator) for k in ("en", "sw", "es")}
    metadata = {"n_layers": N_LAYERS, "fingerprint": model.fingerprint, "model": name, **changes}
    return probe_subspaces(pooled, central="en", metadata=metadata)


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LanguageModel:
    """A model for all tests, whose fingerprint is worked out once."""
    return load_model(tiny_folder, dtype="float32")


@pytest.fixture
def probe(run: Any, tiny: LanguageModel) -> Path:
    """The folder of a probe, as `polylens probe` leaves it."""
    make_subspaces(tiny, "tiny").save(Path("probe/subspaces.safetensors"))
    return Path("probe")


def test_answers_side_by_side(run: Any, probe: Path, tiny_folder: Path) -> None:
    steer = ["steer", probe, "Rain?", "Why [b]me[/b]?", "--model", tiny_folder, *PUSH]
    code, out, err = run(*steer, "--strength", "0,8", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["steerings"]["towards sw 8"] == [
        {"action": "towards", "language": "sw", "strength": 8.0, "layers": [1, 2]}
    ]
    for one in found["prompts"]:
        answers = one["answers"]
        assert list(answers) == ["before", "towards sw 0", "towards sw 8"]
        assert answers["before"] == answers["towards sw 0"]
        assert {answer["detected"] for answer in answers.values()} <= {
            "en", "sw", "es", "unknown", "empty",
        }  # fmt: skip
    assert any(
        one["answers"]["before"] != one["answers"]["towards sw 8"] for one in found["prompts"]
    )
    code, out, err = run(*steer)
    assert code == 0, err
    for word in ("before", "towards sw 1", "Rain?", "Why [b]me[/b]?"):
        assert word in out


def test_prompts_from_a_file_and_from_a_pipe(
    run: Any, probe: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("questions.txt").write_text("One?\n\n Two? \n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\nTwo?\n"))
    outputs = []
    for given in (["--prompts", "questions.txt"], []):
        code, out, err = run(
            "steer", probe, *given, "--model", tiny_folder, *PUSH, "--json", "--quiet"
        )
        assert code == 0, err
        outputs.append(json.loads(out))
    assert outputs[0] == outputs[1]
    assert [one["prompt"] for one in outputs[0]["prompts"]] == ["One?", "Two?"]


def test_every_combination_is_tried(run: Any, probe: Path, tiny_folder: Path) -> None:
    code, out, err = run(
        "steer", probe, "Rain?", "--model", tiny_folder, "--towards", "Swahili,es",
        "--layers", "2", "--remove", "0.5", "--remove-layers", "0,1", "--reinsert", "0,1",
        "--reinsert-layer", 3, "--max-new-tokens", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    labels = [
        f"towards {k} 1, remove 0.5{back}" for k in ("sw", "es") for back in ("", ", reinsert 1")
    ]
    found = json.loads(out)["steerings"]
    assert list(found) == labels
    assert found[labels[1]][1] == {
        "action": "removal", "strength": 0.5, "layers": [0, 1], "reinsert": 1.0,
        "reinsert_at": 3, "reference": "mean",
    }  # fmt: skip


def test_measuring_by_strength(run: Any, probe: Path, tiny_folder: Path) -> None:
    measure = [
        "steer", probe, "--model", tiny_folder, *PUSH, "--strength", "0,8", "--measure",
        "--rows", 3, "-l", "en", "--out", "figures",
    ]  # fmt: skip
    code, out, err = run(*measure)
    assert code == 0, err
    assert "answered in it" in out
    assert "figures/steering.json" in out
    found = json.loads(Path("figures/steering.json").read_text())
    assert (found["n_rows"], found["languages"]) == (3, ["en", "sw"])
    before, zero, pushed = found["results"]
    assert before["measures"] == []
    assert before["fidelity"] == zero["fidelity"]
    assert {one["change"]["difference"] for one in zero["measures"]} == {0}
    names = [one["task"]["name"] for one in pushed["measures"]]
    assert names == [
        "fidelity_en", "fidelity_sw", "in_en_sw", "repeating_en", "repeating_sw",
        "bits_per_byte_en", "bits_per_byte_sw",
    ]  # fmt: skip
    bits = [one for one in pushed["measures"] if one["task"]["metric"] == "bits_per_byte"]
    assert all(one["change"]["difference"] != 0 for one in bits)
    lines = [json.loads(line) for line in Path("figures/answers.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 2 * 3
    for result in found["results"]:
        for language, fidelity in result["fidelity"].items():
            own = [
                line["detected"]
                for line in lines
                if (line["steering"], line["language"]) == (result["label"], language)
            ]
            assert fidelity["passed"] == own.count(language)
            assert fidelity["n"] == len(own) == 3


def test_the_model_is_that_of_the_run(run: Any, tiny: LanguageModel, tiny_folder: Path) -> None:
    config = RunConfig(model=str(tiny_folder), languages=("sw", "es"))
    Path("run").mkdir()
    Path("run/resolved.yaml").write_text(dump_yaml(config))
    make_subspaces(tiny, "tiny").save(Path("run/subspaces.safetensors"))
    code, out, err = run("steer", "run", "Rain?", *PUSH, "--json")
    assert code == 0, err
    assert len(json.loads(out)["prompts"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Hi", "--towards", "fr"], "one of the probed languages (sw, es), got 'fr'"),
        (["Hi", "--towards", "swahilli"], "did you mean 'swahili'?"),
        (["Hi", "--towards", "en"], "push away from another by a negative strength"),
        (["Hi", "--towards", "sw", "--layers", "4"], "decoder layers, 0 to 3, got 4"),
        (["Hi", "--towards", "sw", "--layers", "a-b"], "--layers must be layers by commas"),
        (["Hi", "--towards", "sw", "--strength", "much"], "--strength must be numbers by commas"),
        (["Hi", "--towards", "sw", "--strength", "inf"], "strength must be a finite number"),
        (["Hi", "--layers", "1"], "--layers must go with --towards"),
        (["Hi", "--reinsert", "1"], "must go with --remove"),
        (
            ["Hi", "--remove", "1", "--remove-layers", "3", "--reinsert", "1",
             "--reinsert-layer", "1"],
            "layer 3 takes and 1 puts back",
        ),
        (["Hi"], "by --towards, --remove or both"),
        (["--towards", "sw", "--layers", "1"], "there must be something to ask"),
        (["Hi", "--measure", "--towards", "sw", "--layers", "1"], "prompts must be left out"),
        (["--measure", "--remove", "1", "--remove-layers", "1", "-l", "en"], "one besides en"),
        (["Hi", "--prompts", "x", "--towards", "sw", "--layers", "1"], "not both"),
        (["--prompts", "none.txt", "--towards", "sw", "--layers", "1"], "none.txt cannot be read"),
        (["Hi", "--towards", "sw", "--layers", "1"], "one in a folder called 'tiny'; give its"),
        (["Hi", "--towards", "sw", "--layers", "1", "--model", "{other}"], "on another one (tiny)"),
    ],
)  # fmt: skip
def test_faulty_use_ends_in_one_sentence(
    run: Any,
    probe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    if "{other}" in arguments:
        save_tiny(tmp_path / "other", "qwen2")
    arguments = [argument.format(other=tmp_path / "other") for argument in arguments]
    code, out, err = run("steer", probe, *arguments)
    assert message in " ".join(err.split())
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_no_subspaces(run: Any) -> None:
    code, _, err = run("steer", "none", "Hi", "--towards", "sw")
    assert code == 2
    assert "there is none" in err
