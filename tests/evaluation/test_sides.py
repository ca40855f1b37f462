"""Sides: what the user names becomes the right models, and a second run does nothing again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polylens.config import Runtime
from polylens.corpora import starter_corpus
from polylens.crown import CrownDelta
from polylens.errors import UsageError
from polylens.evaluation.measures import compare_scorecards
from polylens.evaluation.sides import AFTER, BEFORE, Protocol, Side, choose_sides, evaluate_sides
from polylens.models import load_model
from tiny import save_tiny, tiny_tokenizer


@pytest.fixture
def delta(tiny_folder: Path, tmp_path: Path) -> Path:
    model = load_model(tiny_folder)
    name = model.structure.parameter_name(3, "mlp.down_proj.weight")
    change = 0.05 * model.causal_lm.get_parameter(name).detach().clone()
    metadata = {"model": model.name, "fingerprint": model.fingerprint, "layers": [3]}
    CrownDelta({name: change}, metadata).save(tmp_path / "delta.safetensors")
    return tmp_path / "delta.safetensors"


def protocol(*built_in: str) -> Protocol:
    return Protocol(
        rows=starter_corpus().select(("en", "sw")).split(3)[1],
        central="en",
        languages=("sw",),
        built_in=built_in,
        benchmarks=(),
        limit=None,
        data_dir=None,
        template="auto",
        max_new_tokens=2,
        with_samples=True,
    )


def test_what_a_target_means(delta: Path, tiny_folder: Path, tmp_path: Path) -> None:
    base = str(tiny_folder)
    assert choose_sides("a", None, None) == [Side(AFTER, "a")]
    assert choose_sides("a", "b", None) == [Side(BEFORE, "b"), Side(AFTER, "a")]
    assert choose_sides(str(delta), base, None) == [
        Side(BEFORE, base),
        Side(AFTER, base, None, delta, 1.0),
    ]
    assert [(s.label, s.strength) for s in choose_sides(str(delta), base, [1, 0.5, 0.5])[1:]] == [
        ("after-0.5", 0.5),
        ("after-1", 1),
    ]
    run = tmp_path / "run"
    run.mkdir()
    (run / "resolved.yaml").write_text("model: m\nlanguages: [sw]\noutput:\n  strength: 0.75\n")
    assert choose_sides(str(run), None, None)[1].strength == 0.75
    (run / "gate.json").write_text('{"strength": 0.25}')
    assert choose_sides(str(run), None, None)[1].strength == 0.25  # what the gate left of it
    assert choose_sides(str(run), "m2", None)[0].model == "m2"
    with pytest.raises(UsageError, match="--strength must go with a run or a delta"):
        choose_sides("a", None, [1.0])
    with pytest.raises(UsageError, match="belongs to one in a folder called 'tiny'"):
        choose_sides(str(delta), None, None)


def test_a_second_run_does_nothing_and_more_tasks_add_to_it(
    delta: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    sides, out = choose_sides(str(delta), str(tiny_folder), None), tmp_path / "out"
    told: list[str] = []
    cards = evaluate_sides(sides, protocol("bits_per_byte"), out, Runtime(), on_part=told.append)
    before = compare_scorecards(*cards)
    cards = evaluate_sides(sides, protocol("bits_per_byte"), out, Runtime(), on_part=told.append)
    assert compare_scorecards(*cards) == before
    assert any(one.change.difference for one in before)
    both = protocol("bits_per_byte", "retrieval")
    evaluate_sides(sides, both, out, Runtime(), on_part=told.append)
    assert told == ["bits_per_byte", "retrieval"]


def test_answers_of_another_strength_are_not_mixed_in(
    delta: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    asked, base = protocol("bits_per_byte"), str(tiny_folder)
    evaluate_sides(choose_sides(str(delta), base, None), asked, tmp_path / "out", Runtime())
    other = choose_sides(str(delta), base, [0.5])
    with pytest.raises(UsageError, match="choose another --out"):
        evaluate_sides(other, asked, tmp_path / "out", Runtime())


def test_two_models_are_evaluated_one_after_the_other(
    tiny_folder: Path, taught_folder: Path, tmp_path: Path
) -> None:
    sides = choose_sides(str(taught_folder), str(tiny_folder), None)
    cards = evaluate_sides(sides, protocol("bits_per_byte"), tmp_path / "out", Runtime())
    assert [card.identity["model"] for card in cards] == [str(tiny_folder), str(taught_folder)]
    assert all(one.change.difference for one in compare_scorecards(*cards))


def test_another_tokenizer_is_refused_before_anything_is_measured(
    tiny_folder: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", "qwen2")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    sides = choose_sides(str(other), str(tiny_folder), None)
    with pytest.raises(UsageError, match="must have the same tokenizer"):
        evaluate_sides(sides, protocol("bits_per_byte"), tmp_path / "out", Runtime())
    assert not (tmp_path / "out/after").exists()
