"""`polylens baseline`: a delta that `evaluate` takes, a record of its cost, clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polylens.crown import CrownDelta

QUICK = ["-s", "rows=4", "-s", "epochs=1", "-s", "batch_size=2"]


def test_sft_ends_in_a_delta_that_evaluate_takes(run: Any, tiny_folder: Path) -> None:
    code, out, err = run("baseline", "sft", "-l", "sw", "--model", tiny_folder, *QUICK)
    assert code == 0, err
    assert "2 steps on 4 sw rows" in out
    assert not Path("runs/sft/checkpoint.safetensors").exists()
    record = json.loads(Path("runs/sft/baseline.json").read_text())
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 10_000_000
    assert record["result_bytes"] == Path("runs/sft/delta.safetensors").stat().st_size
    cost = CrownDelta.load(Path("runs/sft/delta.safetensors")).metadata["cost"]
    assert {key: record[key] for key in cost} == cost
    command = out.partition("measure ")[2].split()
    assert command[:4] == ["polylens", "evaluate", "runs/sft/delta.safetensors", "-l"]
    code, out, err = run(*command[1:], "-t", "bits_per_byte", "--rows", 2, "--no-gate")
    assert code == 0, err
    assert "bits_per_byte_sw" in out


def test_pretraining_and_low_rank_updates_leave_the_same_kind_of_thing(
    run: Any, tiny_folder: Path
) -> None:
    pytest.importorskip("peft")
    for kind, extra in (("pretraining", "replay_ratio=1"), ("sft-lora", "rank=2")):
        code, out, err = run(
            "baseline", kind, "-l", "sw", "--model", tiny_folder, *QUICK, "-s", extra,
            "--out", kind, "--json",
        )  # fmt: skip
        assert code == 0, err
        record = json.loads(out)
        assert record["method"] == kind
        assert record["rows"] == ({"sw": 4, "en": 4} if kind == "pretraining" else {"sw": 4})
        assert CrownDelta.load(Path(kind) / "delta.safetensors").metadata["method"] == kind


def test_few_shot_is_a_template_that_evaluate_takes(run: Any, tiny_folder: Path) -> None:
    Path("sw.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Swali {n}?", "answer": "Ndiyo."}) + "\n" for n in range(4))
    )
    code, out, err = run(
        "baseline", "few-shot", "sw.jsonl", "-l", "sw", "--model", tiny_folder, "-s", "shots=2",
        "--out", "shots",
    )  # fmt: skip
    assert code == 0, err
    assert "2 examples" in out
    record = json.loads(Path("shots/baseline.json").read_text())
    assert record["tokens_per_prompt"] > 2 * len("Swali 1?Ndiyo.")
    without, with_shots, compare = (
        line.partition("polylens ")[2].split() for line in out.splitlines() if "polylens " in line
    )
    for command in (without, with_shots):
        code, _, err = run(*command, "--rows", 2, "--max-new-tokens", 2)
        assert code == 0, err
    code, out, err = run(*compare)
    assert code in (0, 3), err
    assert "fidelity_sw" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft"], "target languages must be named and differ from the central one (en), got none"),
        (["sft", "-l", "en"], "got en; for example --languages sw"),
        (["sft", "sw.txt", "-l", "sw"], "must be prompts with answers in languages that can be"),
        (["sft", "answers.jsonl", "-l", "bn"], "has none in bn"),
        (["sft", "answers.jsonl", "-l", "sw", "-s", "replay_ratio=1"], "has none in en"),
        (["sft", "none.jsonl", "-l", "sw"], "there is no none.jsonl"),
        (["sft", "-l", "sw", "-s", "rank=3"], "unknown key rank"),
        (["sft", "-l", "sw", "-s", "max_tokens=3"], "none does in 3 tokens"),
        (["sft", "-l", "sw", "-s", "layers=9"], "between 1 and 4"),
        (["pretraining", "sw.txt", "-l", "bn"], "has none in bn"),
        (["few-shot", "answers.jsonl", "-l", "sw,bn"], "must have one target language, got sw, bn"),
        (["few-shot", "answers.jsonl", "-l", "sw"], "but only 1 do"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    run: Any, tiny_folder: Path, arguments: list[str], message: str
) -> None:
    Path("sw.txt").write_text("Habari\n")
    Path("answers.jsonl").write_text('{"language": "sw", "prompt": "Habari?", "answer": "Ndiyo"}\n')
    code, out, err = run("baseline", *arguments, "--model", tiny_folder)
    assert message in " ".join(err.split())
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert not list(Path().rglob("baseline.json"))


def test_without_peft_it_says_how_to_install_it(
    run: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    code, _, err = run("baseline", "sft-lora", "-l", "sw", "--model", tiny_folder)
    assert code == 2
    assert "pip install 'polylens[lora]'" in " ".join(err.split())
