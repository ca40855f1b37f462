"""The forecast: signs are what a plain reference makes of a model; sentences follow the rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polylens import forecast as module
from polylens.corpora import ParallelCorpus, starter_corpus
from polylens.errors import CorpusError
from polylens.forecast import ANSWERED, HARDLY_KNOWN, Signs, forecast_gain, measure_signs
from polylens.models.loading import LanguageModel
from polylens.prompts import choose_format

LANGUAGES = ("en", "sw", "zh")
ENGLISH = "This is an answer in English, whatever the question was."
CHINESE = "这是一个用中文写的回答。"
SIGNS = Signs(
    n_texts=32,
    separability=1.0,
    distance=3.0,
    tokens_per_word=3.04,
    tokens_per_byte=0.5,
    relative_tokens=2.0,
    bits_per_byte=4.1,
    relative_bits=2.0,
    reply_bits_per_byte=4.0,
    n_answers=10,
    fidelity=0.4,
    repeating=0.0,
)


@pytest.fixture
def rows() -> ParallelCorpus:
    return starter_corpus().select(LANGUAGES).limit(6, 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[int]]:
    """A model that answers in English, then a third of the Chinese questions in Chinese."""
    prompts: list[Sequence[int]] = []

    def answer(model: Any, given: Sequence[Sequence[int]], **_: Any) -> list[str]:
        prompts.extend(given)
        n_chinese = len(given) // 9
        return [ENGLISH] * (len(given) - n_chinese) + [CHINESE] * n_chinese

    monkeypatch.setattr("polylens.evaluation.comparison.generate_answers", answer)
    return prompts


@pytest.mark.parametrize(
    ("changes", "outlook", "said"),
    [
        ({"fidelity": 1.0}, "nothing to gain", "10 of 10 answers are in the language already"),
        ({"fidelity": ANSWERED, "relative_bits": 9.0}, "nothing to gain", "9 of 10 answers"),
        ({"relative_bits": HARDLY_KNOWN}, "hardly known", "4.10 bits per byte, 2.5 times the bits"),
        ({"relative_bits": 3.4}, "hardly known", "in English, 3.0 tokens a word"),
        ({"relative_bits": HARDLY_KNOWN - 0.01}, "worth a run", "4 of 10 answers"),
        ({"fidelity": 0.0}, "worth a run", "0 of 10 answers"),
    ],
)
def test_the_rules(changes: dict[str, float], outlook: str, said: str) -> None:
    found = forecast_gain(dataclasses.replace(SIGNS, **changes), "en")  # type: ignore[arg-type]
    assert found.outlook == outlook
    assert said in found.sentence


def test_signs_are_those_of_a_plain_reference(
    llama: LanguageModel, rows: ParallelCorpus, asked: list[Sequence[int]]
) -> None:
    rows = rows.select(("en", "sw"))
    found = measure_signs(llama, rows, central="en", languages=["sw"])
    texts = {k: [row[k] for row in rows.rows] for k in ("en", "sw")}
    n_bytes = {k: sum(len(text.encode()) for text in own) for k, own in texts.items()}
    for language, own in texts.items():
        bits = sum(_bits(llama, text) for text in own)
        scored = n_bytes[language] - len(own)  # all but the first token: one token is a byte
        assert found[language].bits_per_byte == pytest.approx(bits / scored, rel=1e-4)
        assert found[language].tokens_per_byte == 1
    ratio = n_bytes["sw"] / n_bytes["en"]
    assert found["sw"].relative_tokens == pytest.approx(ratio)
    per_byte = found["sw"].bits_per_byte / found["en"].bits_per_byte
    assert found["sw"].relative_bits == pytest.approx(per_byte * ratio)
    assert found["en"].relative_bits == found["en"].relative_tokens == 1

    # Two languages have one direction, that of the difference of their means.
    states = {
        k: torch.stack([_last_state(llama, text) for text in own]) for k, own in texts.items()
    }
    means = {k: part.mean(0) for k, part in states.items()}
    difference = means["sw"] - means["en"]
    along = {k: part @ difference / difference.norm() for k, part in states.items()}
    spread = sum(float(part.var(correction=0)) for part in along.values()) / 2
    assert found["sw"].distance == pytest.approx(float(difference.norm()) / spread**0.5, rel=1e-3)
    assert found["en"].distance == 0


def test_only_the_first_answers_are_asked_for(
    llama: LanguageModel,
    rows: ParallelCorpus,
    asked: list[Sequence[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "N_ANSWERS", 3)
    found = measure_signs(llama, rows, central="en", languages=["sw", "zh"])
    assert list(found) == ["en", "sw", "zh"]
    assert [own.n_answers for own in found.values()] == [3, 3, 3]
    assert [own.n_texts for own in found.values()] == [6, 6, 6]
    assert [own.fidelity for own in found.values()] == [1, 0, pytest.approx(1 / 3)]
    assert [own.repeating for own in found.values()] == [0, 0, 0]
    template = choose_format(llama.tokenizer, "auto")
    first = [row[k] for k in LANGUAGES for row in rows.rows[:3]]
    assert asked == list(template.encode(llama.tokenizer, first, 128).ids)


def test_every_language_of_a_patchy_corpus_is_read(
    llama: LanguageModel, asked: list[Sequence[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the second language stand after more rows of the first than are read."""
    monkeypatch.setattr(module, "N_ROWS", 3)
    monkeypatch.setattr(module, "N_ANSWERS", 2)
    every = starter_corpus().rows
    patchy = [{"en": row["en"], "sw": row["sw"]} for row in every[:8]]
    patchy += [{"en": row["en"], "zh": row["zh"]} for row in every[8:12]]
    found = measure_signs(
        llama, ParallelCorpus.make("patchy", patchy), central="en", languages=["sw", "zh"]
    )
    assert [own.n_texts for own in found.values()] == [6, 3, 3]
    assert [own.n_answers for own in found.values()] == [4, 2, 2]


def test_a_language_needs_two_rows(
    llama: LanguageModel, rows: ParallelCorpus, asked: list[Sequence[int]]
) -> None:
    single = [rows.rows[0], *({"en": row["en"], "sw": row["sw"]} for row in rows.rows[1:])]
    with pytest.raises(CorpusError, match="has 1 that hold zh with en"):
        measure_signs(
            llama, ParallelCorpus.make("single", single), central="en", languages=["sw", "zh"]
        )
    assert not asked


@torch.no_grad()
def _bits(model: LanguageModel, text: str) -> float:
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    logits = model.causal_lm(ids).logits[0, :-1].double().log_softmax(-1)
    return float(-logits.gather(1, ids[0, 1:, None]).sum()) / math.log(2)


@torch.no_grad()
def _last_state(model: LanguageModel, text: str) -> Tensor:
    ids = choose_format(model.tokenizer, "auto").encode(model.tokenizer, [text], 128).ids[0]
    output = model.causal_lm(torch.tensor([ids]), output_hidden_states=True)
    state: Tensor = output.hidden_states[-1][0, -1].double()
    return state
