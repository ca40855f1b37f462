"""The main job on a tiny model: whole runs, second runs, killed runs, refused runs."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from polylens.config import RunConfig, Runtime, load_config
from polylens.crown import CrownDelta
from polylens.errors import GateError, RunError, SubspaceError
from polylens.evaluation import read_answers
from polylens.models import load_model
from polylens.run import enhance
from polylens.run_folder import STAGES, RunFolder

SETTINGS: dict[str, Any] = {
    "languages": "sw,zh",
    "probe.texts_per_language": 6,
    "train.rows": 8,
    "train.batch_size": 2,
    "train.learning_rate": 1e-3,
    "evaluate.rows": 4,
    "evaluate.max_new_tokens": 4,
    "evaluate.extra_languages": ["es"],
    "gate.text_margin": 9.0,  # four rows of a random model show nothing
    "gate.choice_margin": 9.0,  # nor do its guesses
    "gate.steps": 2,
}


# Batches follow the memory that is free, unless it is given.
RUNTIME = Runtime.model_validate({"memory": "4GB"})


def configure(folder: Path, **changes: Any) -> RunConfig:
    return load_config(None, {**SETTINGS, "model": str(folder), **changes})


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; do not write to it."""
    os.environ["POLYLENS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    out = tmp_path_factory.mktemp("runs") / "first"
    enhance(configure(tiny_folder), out, runtime=RUNTIME)
    return out


def contents(out: Path) -> dict[str, str]:
    """Checksum of every file that must not depend on when and how often the run was started."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "journal.jsonl"
    }


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    assert set(contents(finished)) >= {
        "run.yaml",
        "resolved.yaml",
        "plan.json",
        "subspaces.safetensors",
        "delta.safetensors",
        "evaluation/before.jsonl",
        "evaluation/after.jsonl",
        "evaluation/summary.json",
        "evaluation/before/scorecard.json",
        "evaluation/after/bits_per_byte_sw.jsonl",
        "evaluation/after/choices_en.jsonl",
        "gate.json",
        "evaluation/states.safetensors",
        "model/model.safetensors",
        "model/README.md",
        "model/tokenizer.json",
        "report.html",
    }
    assert not list(finished.rglob("*.part"))
    assert not RunFolder(finished).checkpoint.exists()
    assert [e["stage"] for e in RunFolder(finished).journal.entries()] == list(STAGES)
    summary = json.loads((finished / "evaluation/summary.json").read_text())
    assert summary["fidelity"].keys() == {"en", "sw", "zh", "es"}
    assert summary["state_change"]["sw"]["relative"] > 0
    gate = json.loads((finished / "gate.json").read_text())
    read = {(c["language"], c["protocol"]) for c in gate["tried"][0]["verdict"]["checks"]}
    assert read == {("en", "text"), ("en", "choice"), ("sw", "text"), ("zh", "text")}
    card = (finished / "model/README.md").read_text()
    assert summary["repetition_penalty"] == 1
    assert "the target languages' prompts are held up to their last token" in card
    plan = json.loads((finished / "plan.json").read_text())
    training = plan["corpora"]["training"]
    n_choices = training["retained_choices"]
    assert n_choices == training["rows"] // 2 > 0
    assert f"so is, for {n_choices} of PolyLens's own questions in English with two answers" in card
    assert "no answers are learned" in card


def test_answers_are_written_under_the_penalty(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    config = configure(tiny_folder, **{"evaluate.repetition_penalty": 8.0})
    held = enhance(config, tmp_path / "held", runtime=RUNTIME)
    assert held.evaluation.repetition_penalty == 8
    for when in ("before", "after"):
        free, penalised = (
            [one.answer for one in read_answers(folder.answers(when))]
            for folder in (RunFolder(finished), held.folder)
        )
        assert penalised != free


def test_a_wreck_of_english_is_not_saved(taught_folder: Path, tmp_path: Path) -> None:
    wreck = {"train.learning_rate": 0.3, "train.retain_weight": 0.0, "gate.text_margin": 0.01}
    result = enhance(configure(taught_folder, **wreck), tmp_path / "run")
    assert not result.dial.holds
    with pytest.raises(GateError, match="at no strength"):
        result.dial.require()
    assert not result.folder.model.exists()
    assert result.folder.report.exists()
    again = enhance(configure(taught_folder, **wreck), tmp_path / "run")
    assert again.done == ()


def test_the_dial_is_turned_down_to_where_english_holds(
    taught_folder: Path, tmp_path: Path
) -> None:
    strong = {
        "gate.steps": 8,
        "gate.targets": False,
        "train.learning_rate": 0.02,
        "train.retain": "states",  # which holds English less
        "train.retain_targets": False,
        "train.retain_choices": 0,
        "evaluate.rows": 16,
    }
    wide = enhance(configure(taught_folder, **strong), tmp_path / "wide")
    costs = [
        -verdict.checks[0].result.bound
        for verdict in wide.dial.verdicts.values()
        if verdict is not None
    ]
    assert costs == sorted(costs)
    between = (costs[2] + costs[3]) / 2  # a margin that puts the boundary between them
    dialled = enhance(
        configure(taught_folder, **strong, **{"gate.text_margin": between}), tmp_path / "dialled"
    )
    assert (dialled.dial.strength, dialled.dial.holds) == (3 / 8, True)
    assert "turned down from 1 to 0.375" in dialled.dial.sentence()
    base = load_model(taught_folder)
    delta = CrownDelta.load(dialled.folder.delta, fingerprint=base.fingerprint)
    saved = AutoModelForCausalLM.from_pretrained(dialled.folder.model, dtype=torch.float32)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad(), delta.applied(base.structure, 3 / 8):
        assert torch.equal(saved(ids).logits, base.causal_lm(ids).logits)


def test_no_path_of_the_machine_is_in_what_is_shared(finished: Path) -> None:
    for name in ("model/README.md", "plan.json"):
        assert str(finished.parent) not in (finished / name).read_text()
        assert "/tmp" not in (finished / name).read_text()


def test_the_merged_model_is_the_delta_applied(finished: Path, tiny_folder: Path) -> None:
    base = load_model(tiny_folder)
    delta = CrownDelta.load(finished / "delta.safetensors", fingerprint=base.fingerprint)
    saved = AutoModelForCausalLM.from_pretrained(finished / "model", dtype=torch.float32)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad(), delta.applied(base.structure):
        expected = base.causal_lm(ids).logits
        assert torch.equal(saved(ids).logits, expected)


def test_a_second_run_does_nothing(finished: Path, tiny_folder: Path) -> None:
    before, journal = contents(finished), (finished / "journal.jsonl").read_bytes()
    result = enhance(configure(tiny_folder), finished)
    assert result.done == ()
    assert contents(finished) == before
    assert (finished / "journal.jsonl").read_bytes() == journal


def test_a_deleted_result_is_made_again_and_nothing_else(finished: Path, tiny_folder: Path) -> None:
    before = contents(finished)
    (finished / "report.html").unlink()
    result = enhance(configure(tiny_folder), finished)
    assert result.done == ("report",)
    assert contents(finished) == before


def test_a_folder_of_another_run_is_refused(finished: Path, tiny_folder: Path) -> None:
    before = contents(finished)
    with pytest.raises(RunError, match="holds a run with other settings"):
        enhance(configure(tiny_folder, seed=1), finished)
    assert contents(finished) == before


def test_other_inputs_than_at_the_beginning_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"en": f"Say {n}", "sw": f"Sema {n}", "zh": f"说{n}", "es": f"Di {n}"} for n in "abcdefgh"
    ]
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text("\n".join(map(json.dumps, rows)))
    config = configure(tiny_folder, **{"train.corpus": str(corpus)})
    folder = RunFolder(tmp_path / "run")
    enhance(config, folder.path)
    folder.delta.unlink()
    corpus.write_text("\n".join(map(json.dumps, rows[:-1])))
    with pytest.raises(RunError, match="must go on with the inputs that it began with"):
        enhance(config, folder.path)


def test_a_folder_with_other_files_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="holds other files"):
        enhance(configure(tiny_folder), tmp_path)
    with pytest.raises(RunError, match="is a file"):
        enhance(configure(tiny_folder), tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_subspaces_of_another_model_are_refused(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    from polylens.subspaces import Subspaces
    from tiny import save_tiny

    other = load_model(save_tiny(tmp_path / "other", "qwen2"))
    with pytest.raises(SubspaceError, match="probed on another one"):
        Subspaces.load(finished / "subspaces.safetensors", fingerprint=other.fingerprint)


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from polylens.config import Runtime, load_config
from polylens.run import enhance
import torch
torch.set_num_threads(1)

settings, out = json.loads(sys.argv[1]), Path(sys.argv[2])
stage, calls = sys.argv[3], int(sys.argv[4])
state = {"on": False, "calls": 0}

def on_stage(name):
    state["on"] = name == stage
    if state["on"] and calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total, what):
    state["calls"] += state["on"]
    if state["on"] and state["calls"] == calls:
        os.kill(os.getpid(), signal.SIGKILL)

runtime = Runtime(memory="4GB")
enhance(load_config(None, settings), out, runtime=runtime, on_stage=on_stage, progress=progress)
"""

# (stage, progress calls within it before the kill; 0 kills as it starts)
_KILLS = [
    ("probe", 2),
    ("train", 0),
    ("train", 9),
    ("gate", 2),
    ("answers-before", 1),
    ("answers-after", 0),
    ("states", 2),
    ("model", 0),
    ("report", 0),
]


@pytest.mark.slow  # a process for each; tests/faults kills forked ones
def test_a_run_killed_in_every_stage_ends_in_the_same_bytes(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    script = tmp_path / "run.py"
    script.write_text(_KILLED)
    environment = {**os.environ, "POLYLENS_CACHE": str(tmp_path / "cache")}
    settings = json.dumps({**SETTINGS, "model": str(tiny_folder)})

    def start(stage: str, calls: int) -> int:
        command = [sys.executable, str(script), settings, str(out), stage, str(calls)]
        return subprocess.run(command, env=environment, check=False).returncode

    for stage, calls in _KILLS:
        assert start(stage, calls) == -signal.SIGKILL, (stage, calls)
    assert start("none", 0) == 0
    assert contents(out) == contents(finished)
    stages = [entry["stage"] for entry in RunFolder(out).journal.entries()]
    assert stages == list(STAGES), "a finished stage was repeated"


@pytest.mark.parametrize("family_name", ["gemma3", "qwen3_moe"])
def test_other_families_run_whole(family_name: str, tmp_path: Path) -> None:
    from tiny import save_tiny

    folder = save_tiny(tmp_path / family_name, family_name, chat_template=False)
    result = enhance(configure(folder, **{"evaluate.extra_languages": []}), tmp_path / "run")
    assert result.done == STAGES
    assert result.evaluation.state_change["sw"].relative > 0
