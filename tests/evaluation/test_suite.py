"""The suite: every candidate's figures are those of the model with that crown applied."""

from __future__ import annotations

import pytest
import torch

from polylens.corpora import starter_corpus
from polylens.crown import CrownDelta
from polylens.evaluation.comparison import Heldout
from polylens.evaluation.fidelity import is_repeating
from polylens.evaluation.likelihood import encode_plain
from polylens.evaluation.measures import TaskRun
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.suite import (
    BITS_PER_BYTE,
    BUILT_IN,
    FIDELITY,
    RETRIEVAL,
    Suite,
    retrieved,
    run_suite,
)
from polylens.models.loading import LanguageModel
from polylens.prompts import choose_format, encode_parallel
from test_crown import random_delta

LANGUAGES = ("en", "sw", "zh")


@pytest.fixture
def heldout(llama: LanguageModel) -> Heldout:
    rows = starter_corpus().select(LANGUAGES).split(4)[1]
    template = choose_format(llama.tokenizer, "auto")
    prompts = encode_parallel(rows, LANGUAGES, template, llama.tokenizer, 128)
    return Heldout(rows, prompts, rows.to_corpus().texts, "en", ("sw", "zh"))


@pytest.fixture
def delta(llama: LanguageModel) -> CrownDelta:
    return random_delta(llama, 0.1)


def run(model: LanguageModel, candidates: list[Candidate], heldout: Heldout) -> dict[str, TaskRun]:
    suite = Suite(BUILT_IN, (), heldout, max_new_tokens=4)
    return {one.task.name: one for _, part in run_suite(model, candidates, suite) for one in part}


def values(task_run: TaskRun, candidate: int) -> list[float]:
    return [one.value for one in task_run.examples[candidate]]


def test_bits_per_byte_are_those_of_the_whole_model(
    llama: LanguageModel, heldout: Heldout, delta: CrownDelta
) -> None:
    found = run(llama, [Candidate(), Candidate(delta, 0.5)], heldout)["bits_per_byte_sw"]
    for number, strength in enumerate((0.0, 0.5)):
        expected = []
        with torch.no_grad(), delta.applied(llama.structure, strength):
            for text in heldout.texts["sw"]:
                ids, n_bytes = encode_plain(llama.tokenizer, text, 512)
                tensor = torch.tensor([ids])
                loss = llama.causal_lm(tensor, labels=tensor).loss.item()
                expected.append(loss * (len(ids) - 1) / torch.tensor(2.0).log().item() / n_bytes)
        assert values(found, number) == pytest.approx(expected, rel=1e-5)


def test_a_crown_of_strength_0_is_the_untouched_model(
    llama: LanguageModel, heldout: Heldout, delta: CrownDelta
) -> None:
    found = run(llama, [Candidate(), Candidate(delta, 0.0), Candidate(delta)], heldout)
    for task_run in found.values():
        assert values(task_run, 0) == values(task_run, 1)
    assert values(found["bits_per_byte_en"], 0) != values(found["bits_per_byte_en"], 2)


def test_every_part_has_every_language(
    llama: LanguageModel, heldout: Heldout, delta: CrownDelta
) -> None:
    names = set(run(llama, [Candidate(delta)], heldout))
    assert names == {
        *(f"{BITS_PER_BYTE}_{k}" for k in LANGUAGES),
        *(f"{FIDELITY}_{k}" for k in LANGUAGES),
        *(f"{RETRIEVAL}_{k}" for k in LANGUAGES[1:]),
    }


def test_finished_parts_are_skipped(llama: LanguageModel, heldout: Heldout) -> None:
    suite = Suite(BUILT_IN, (), heldout, max_new_tokens=2)
    told: list[str] = []
    skip = frozenset((BITS_PER_BYTE, FIDELITY))
    parts = run_suite(llama, [Candidate()], suite, skip=skip, on_part=told.append)
    assert [name for name, _ in parts] == told == [RETRIEVAL]


def test_answers_are_written_under_the_penalty(llama: LanguageModel, heldout: Heldout) -> None:
    """A tiny model of random weights says the same token for ever, unless that costs it."""

    def answers(penalty: float) -> list[str]:
        suite = Suite((FIDELITY,), (), heldout, max_new_tokens=12, repetition_penalty=penalty)
        ((_, runs),) = run_suite(llama, [Candidate()], suite)
        return [one.responses["answer"] for run in runs for one in run.examples[0]]

    free, held = answers(1.0), answers(8.0)
    assert free != held
    assert sum(map(is_repeating, held)) < sum(map(is_repeating, free))


def test_a_text_finds_its_translation_by_the_angle() -> None:
    keys = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]]])  # (3, 1 layer, 2)
    queries = torch.tensor([[[9.0, 1.0]], [[0.1, 0.2]], [[1.0, 0.1]]])
    assert retrieved(queries, keys).tolist() == [[1], [1], [0]]


def test_identical_texts_find_each_other_in_every_layer(llama: LanguageModel) -> None:
    rows = starter_corpus().select(("en", "sw")).split(6)[1]
    twins = type(rows)(rows.name, tuple({"en": r["en"], "sw": r["en"]} for r in rows.rows))
    template = choose_format(llama.tokenizer, "auto")
    prompts = encode_parallel(twins, ("en", "sw"), template, llama.tokenizer, 128)
    heldout = Heldout(twins, prompts, twins.to_corpus().texts, "en", ("sw",))
    (examples,) = run(llama, [Candidate()], heldout)["retrieval_sw"].examples
    for one in examples:
        n_layers = llama.structure.n_layers
        assert one.responses == {"raw": [1] * (n_layers + 1), "centred": [1] * (n_layers + 1)}
