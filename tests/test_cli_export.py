"""`polylens export`: every format from a run's folder, and one clear sentence otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import polylens
from polylens.artefacts import write_json
from polylens.config import RunConfig, dump_yaml
from polylens.corpora import starter_corpus
from polylens.crown import CrownDelta
from polylens.evaluation.gate import Dial
from test_crown import random_delta
from tiny import save_tiny


def make_run(folder: Path, model: Path) -> Path:
    """A run's folder as far as exports read it; its strength is 0.5."""
    loaded = polylens.load_model(model)
    folder.mkdir()
    random_delta(loaded).save(folder / "delta.safetensors")
    corpus = starter_corpus().limit(4, 0).to_corpus()
    subspaces = polylens.probe(loaded, corpus, languages=["en", "sw", "zh"])
    subspaces.save(folder / "subspaces.safetensors")
    config = RunConfig.model_validate(
        {"model": str(model), "languages": ["sw", "zh"], "output": {"strength": 0.5}}
    )
    (folder / "resolved.yaml").write_text(dump_yaml(config))
    return folder


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first", tiny_folder)


def export(run: Any, *arguments: object) -> dict[str, Any]:
    code, out, err = run("export", *arguments, "--json", "--quiet")
    assert code == 0, err
    told = json.loads(out)
    target = Path(told["out"])
    files = [target] if target.is_file() else list(target.rglob("*"))
    assert told["bytes"] == sum(file.stat().st_size for file in files) > 0
    return told


def test_a_delta_is_written_at_the_strength_of_the_run_or_the_one_given(
    run: Any, finished: Path
) -> None:
    delta = CrownDelta.load(finished / "delta.safetensors")
    assert export(run, finished, "-f", "delta", "-o", "a.safetensors")["strength"] == 0.5
    export(run, finished, "-f", "delta", "-o", "b.safetensors", "--strength", 2)
    for name, factor in (("a", 0.5), ("b", 2.0)):
        scaled = CrownDelta.load(Path(f"{name}.safetensors")).changes
        assert all(torch.equal(scaled[k], factor * change) for k, change in delta.changes.items())


def test_a_merged_model_has_the_weights_of_the_strength(
    run: Any, finished: Path, tiny_folder: Path
) -> None:
    told = export(run, finished, "-f", "merged", "-o", "m", "--strength", 0.25)
    assert told["dtype"] == "float32"
    merged = dict(AutoModelForCausalLM.from_pretrained("m").named_parameters())
    base = dict(AutoModelForCausalLM.from_pretrained(tiny_folder).named_parameters())
    for name, change in CrownDelta.load(finished / "delta.safetensors").changes.items():
        torch.testing.assert_close(merged[name], base[name] + 0.25 * change)
    told = export(run, finished, "-f", "merged", "-o", "n", "--save-dtype", "bfloat16")
    assert told["dtype"] == "bfloat16"


def test_a_delta_without_its_run_is_exported_with_its_model_named(
    run: Any, finished: Path, tiny_folder: Path
) -> None:
    delta = finished / "delta.safetensors"
    told = export(run, delta, "-f", "gguf", "-o", "m.gguf", "-m", tiny_folder)
    assert told["strength"] == 1
    assert told["numbers"] == "float16"
    assert told["n_tensors"] == len(gguf.GGUFReader("m.gguf").tensors)
    code, _, err = run("export", delta, "-f", "gguf", "-o", "other.gguf")
    assert (code, "by --model to export" in err) == (2, True)


def test_the_ranks_of_an_adapter_are_shown(run: Any, finished: Path) -> None:
    told = export(run, finished, "-f", "lora", "-o", "a", "--keep", 0.6, "--matrices-only")
    code, out, _ = run("export", finished, "-f", "lora", "-o", "b", "--rank", told["rank"])
    assert code == 0
    assert f"{told['rank']} ←" in out
    assert f"at rank {told['rank']}, 4 other weights (128 numbers) held whole" in out
    assert json.loads(Path("b/adapter_config.json").read_text())["r"] == told["rank"]


def test_a_control_vector_needs_no_model(run: Any, finished: Path) -> None:
    told = export(
        run, finished, "-f", "control-vector", "-o", "sw.gguf", "-l", "Swahili", "--layers", "1-2"
    )
    assert told["layers"] == [1, 2]
    assert told["strength"] == 1
    code, out, _ = run(
        "export", finished / "subspaces.safetensors", "-f", "control-vector", "-o", "sw.gguf",
        "-l", "sw", "--layers", "3,1", "--strength", "1.5",
    )  # fmt: skip
    assert code == 0
    assert "1.5 · direction of sw against en, added after layer 1, 3" in out
    assert "--control-vector sw.gguf" in out


def test_a_run_whose_gate_refused_is_exported_on_demand_only(
    run: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    refused = make_run(tmp_path / "refused", tiny_folder)
    write_json(refused / "gate.json", Dial(0.5, False, {0.5: None}, {0.5: ()}).to_dict())
    code, _, err = run("export", refused, "-f", "delta", "-o", "d.safetensors")
    assert (code, "holds at no strength" in err) == (2, True)
    assert export(run, refused, "-f", "delta", "-o", "d.safetensors", "--strength", 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-f", "ggfu"], "got 'ggfu', did you mean 'gguf'?"),
        (["-f", "gguf", "--rank", 4], "--rank must go with --format lora, got gguf"),
        (
            ["-f", "delta", "--save-dtype", "float16"],
            "--save-dtype must go with --format merged or",
        ),
        (["-f", "lora", "--rank", 4, "--keep", 0.5], "leave one out"),
        (["-f", "lora", "--rank", 99], "rank must be between 1 and 32"),
        (["-f", "merged", "--save-dtype", "float61"], "did you mean 'float16'?"),
        (["-f", "gguf", "--save-dtype", "q4_0"], "got 'q4_0', did you mean 'q8_0'?"),
        (["-f", "control-vector", "-l", "sw"], "for example --language sw --layers 20"),
        (["-f", "control-vector", "-l", "fr", "--layers", 2], "one of those probed (en, sw, zh)"),
        (["-f", "control-vector", "-l", "sw", "--layers", 4], "layers 1 to 3 of this model, got 4"),
        (["-f", "control-vector", "-l", "sw", "--layers", "two"], "got 'two'"),
        (["-f", "control-vector", "-l", "sw", "--layers", "3-1"], "got '3-1'"),
    ],
)
def test_wrong_usage_ends_in_one_sentence_and_leaves_nothing(
    run: Any, finished: Path, arguments: list[object], message: str
) -> None:
    code, _, err = run("export", finished, *arguments, "-o", "target", "--quiet")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not list(Path().iterdir())


def test_what_is_no_run_and_what_is_in_the_way_are_refused(run: Any, finished: Path) -> None:
    code, _, err = run("export", "nowhere", "-f", "lora", "-o", "a")
    assert (code, "nowhere is neither" in err) == (2, True)
    Path("used").mkdir()
    Path("used/thesis.tex").write_text("mine")
    code, _, err = run("export", finished, "-f", "lora", "-o", "used")
    assert (code, "used holds files" in err) == (2, True)
    assert Path("used/thesis.tex").read_text() == "mine"
    before = (finished / "delta.safetensors").read_bytes()
    code, _, err = run(
        "export", finished, "-f", "delta", "-o", finished / "delta.safetensors", "--strength", 2
    )
    assert (code, "must not be what is exported" in err) == (2, True)
    assert (finished / "delta.safetensors").read_bytes() == before


def test_a_family_that_gguf_files_are_not_written_for_is_refused(run: Any, tmp_path: Path) -> None:
    gemma = make_run(tmp_path / "gemma", save_tiny(tmp_path / "model", "gemma3"))
    code, _, err = run("export", gemma, "-f", "gguf", "-o", "m.gguf", "--quiet")
    assert code == 2
    assert "got a model of type gemma3_text; export it as merged" in err
