"""Adaptive strength: a language is pushed by what the model's own answers lack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from polylens import shortfall
from polylens.config import TrainSettings
from polylens.corpora import ParallelCorpus, starter_corpus
from polylens.models.loading import LanguageModel
from polylens.prompts import choose_format, encode_parallel
from polylens.shortfall import measure_shortfall
from polylens.steps import probe, train

LANGUAGES = ("en", "sw", "zh")
ENGLISH = "This is an answer in English, whatever the question was."
CHINESE = "这是一个用中文写的回答。"


@pytest.fixture
def rows() -> ParallelCorpus:
    return starter_corpus().select(LANGUAGES).limit(8, 0)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A model that answers all Swahili and every fourth Chinese question in English."""
    asked: list[int] = []

    def answer(model: Any, prompts: Sequence[Any], **_: Any) -> list[str]:
        asked.append(len(prompts))
        half = len(prompts) // 2
        chinese = [ENGLISH if k % 4 == 0 else CHINESE for k in range(half)]
        return [ENGLISH] * half + chinese

    monkeypatch.setattr("polylens.shortfall.generate_answers", answer)
    return asked


def test_the_shortfall_is_the_share_in_other_languages(
    llama: LanguageModel, rows: ParallelCorpus, answers: list[int]
) -> None:
    prompts = encode_parallel(
        rows, LANGUAGES, choose_format(llama.tokenizer, "auto"), llama.tokenizer, 64
    )
    found = measure_shortfall(llama, prompts, "en", ["sw", "zh"])
    assert found == {"sw": 1.0, "zh": 0.25}
    assert answers == [16]
    measure_shortfall(llama, prompts, "en", ["sw", "zh"], n_prompts=4)
    assert answers[-1] == 8


@pytest.mark.parametrize("position", ["last", "answer"])
def test_auto_trains_as_the_strengths_it_finds(
    llama: LanguageModel,
    rows: ParallelCorpus,
    answers: list[int],
    position: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subspaces = probe(llama, rows.to_corpus(), languages=LANGUAGES)
    how: dict[str, Any] = {"epochs": 1, "max_tokens": 64, "position": position}
    how["loss_layers"] = "trained"
    asked: list[Any] = []
    answer = shortfall.generate_answers

    def noting(model: Any, prompts: Sequence[Any], **options: Any) -> list[str]:
        asked.extend(prompts)
        return answer(model, prompts, **options)

    monkeypatch.setattr(shortfall, "generate_answers", noting)
    auto, fixed = train(
        llama,
        subspaces,
        rows,
        settings=[
            TrainSettings(**how, strength="auto"),
            TrainSettings(**how, strength={"sw": 1.0, "zh": 1.0}),
        ],
    )
    assert auto.metadata["settings"]["strength"] == {"sw": 1.0, "zh": 1.0}
    alone = encode_parallel(
        rows, LANGUAGES, choose_format(llama.tokenizer, "auto"), llama.tokenizer, 64
    )
    assert asked == [alone.ids[row[k]] for k in ("sw", "zh") for row in alone.rows]
    assert all(torch.equal(change, fixed.changes[name]) for name, change in auto.changes.items())
