"""Training on answers, from corpora that have some and corpora that have none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from polylens.config import PRESETS, TrainSettings
from polylens.corpora import ParallelCorpus, starter_corpus
from polylens.corpora.choices import two_answers
from polylens.errors import ConfigError, CorpusError
from polylens.models.loading import LanguageModel, load_model
from polylens.prompts import ParallelPrompts, choose_format
from polylens.steps import encode_shared, probe, train

COMMON = {"max_tokens": 512, "max_answer_tokens": 20, "epochs": 1, "batch_size": 4}


def test_settings_that_learn_answers_share_a_corpus_with_those_that_do_not(
    tiny_folder: Path,
) -> None:
    model, corpus = load_model(tiny_folder), starter_corpus().limit(8)
    subspaces = probe(model, corpus.to_corpus(), languages=("en", "sw"))
    alone = TrainSettings(**COMMON)
    answers = TrainSettings(**{**PRESETS["answers"]["train"], **COMMON})
    beside, learned = train(model, subspaces, corpus, settings=[alone, answers])
    assert beside.metadata["log"][0].keys() > {"align.sw", "separate.sw", "retain"}
    log = learned.metadata["log"]
    assert {name for name in log[0] if "." in name} == {"answer.sw"}
    assert log[1]["answer.sw"] < log[0]["answer.sw"]
    by_itself = train(model, subspaces, corpus, settings=alone)
    assert beside.metadata["log"] == by_itself.metadata["log"]


def test_answers_alone_need_answers(tiny_folder: Path) -> None:
    model, corpus = load_model(tiny_folder), starter_corpus().limit(4)
    subspaces = probe(model, corpus.to_corpus(), languages=("en", "sw"))
    without = dataclasses.replace(corpus, answers={})
    answers = TrainSettings(**{**PRESETS["answers"]["train"], **COMMON})
    with pytest.raises(CorpusError, match="but starter has none; add them"):
        train(model, subspaces, without, settings=answers)
    # Beside Lens's losses there is still something to learn.
    both = answers.model_copy(update={"separate_weight": 1.0})
    assert "answer.sw" not in train(model, subspaces, without, settings=both).metadata["log"][0]


@pytest.mark.parametrize("position", ["last", "answer"])
def test_questions_to_be_retained_come_after_the_rows_and_whole(
    llama: LanguageModel, position: str
) -> None:
    corpus, style = starter_corpus().limit(2), choose_format(llama.tokenizer, "auto")

    def encode(*numbers: int, languages: tuple[str, ...] = ("en", "sw")) -> ParallelPrompts:
        settings = [TrainSettings(position=position, retain_choices=one) for one in numbers]
        return encode_shared(llama.tokenizer, style, corpus, languages, settings)

    plain, found = encode(0), encode(3)
    n_plain = len(plain.ids)
    assert found.ids[:n_plain] == plain.ids
    assert found.rows == (*plain.rows, *({"en": n_plain + place} for place in range(3)))
    assert found.sources == plain.sources
    for name in ("n_answer", "answers"):
        of_prompts = getattr(found, name)
        assert of_prompts is None or len(of_prompts) == len(found.ids)
    texts = [llama.tokenizer.decode(ids) for ids in found.ids[n_plain:]]
    pairs = two_answers("en", "training")[:3]
    for text, asked in zip(texts, (pairs[0][0], pairs[1][1], pairs[2][0]), strict=True):
        assert asked in text
    measured = {text for pair in two_answers("en", "heldout") for text in pair}
    assert not measured & {text for pair in two_answers("en", "training") for text in pair}
    assert len(encode(500).rows) == len(plain.rows) + 96
    with pytest.raises(ConfigError, match="must have one retained_choices, got 0, 3"):
        encode(0, 3)


def test_a_central_language_that_the_starter_corpus_lacks_has_no_such_questions(
    llama: LanguageModel,
) -> None:
    corpus = ParallelCorpus.make("two", [{"hi": "एक दो", "sw": "moja mbili"}])
    style = choose_format(llama.tokenizer, "auto")
    settings = [TrainSettings(retain_choices=3)]
    assert len(encode_shared(llama.tokenizer, style, corpus, ("hi", "sw"), settings).rows) == 1


def test_rows_are_counted_without_the_questions(tiny_folder: Path) -> None:
    model, corpus = load_model(tiny_folder), starter_corpus().limit(4)
    subspaces = probe(model, corpus.to_corpus(), languages=("en", "sw"))
    settings = TrainSettings(**COMMON, retain_choices=4)
    delta = train(model, subspaces, corpus, settings=settings)
    assert delta.metadata["n_rows"] == 4
    assert len(delta.metadata["log"]) == 2
