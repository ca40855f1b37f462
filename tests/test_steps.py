"""Training on answers, from corpora that have some and corpora that have none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from polylens.config import PRESETS, TrainSettings
from polylens.corpora import ParallelCorpus, starter_corpus
from polylens.corpora.choices import heldout_choices, training_choices
from polylens.errors import CorpusError
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
def test_questions_to_be_retained_come_beside_the_rows_and_whole(
    llama: LanguageModel, position: str
) -> None:
    corpus, style = starter_corpus().split(32)[0].limit(4), choose_format(llama.tokenizer, "auto")

    def encode(*ratios: float) -> ParallelPrompts:
        settings = [TrainSettings(position=position, retain_choices=one) for one in ratios]
        return encode_shared(llama.tokenizer, style, corpus, ("en", "sw"), settings)

    plain, found = encode(0.0), encode(0.0, 0.75, 0.5)
    n_plain = len(plain.ids)
    assert found.ids[:n_plain] == plain.ids
    assert (found.rows, found.sources) == (plain.rows, plain.sources)
    assert found.choices == tuple(range(n_plain, n_plain + 3))
    for name in ("n_answer", "answers"):
        of_prompts = getattr(found, name)
        assert of_prompts is None or len(of_prompts) == len(found.ids)
    assert found.without_answers().ids[n_plain:] == found.ids[n_plain:]
    texts = [llama.tokenizer.decode(ids) for ids in found.ids[n_plain:]]
    pairs = training_choices("en", corpus)
    assert len(pairs) == 4
    for text, asked in zip(texts, (pairs[0][0], pairs[1][1], pairs[2][0]), strict=True):
        assert asked in text
    for ratio, n_choices in ((0.0, 0), (0.5, 2), (0.75, 3)):
        settings = TrainSettings(retain_choices=ratio)
        assert found.choices_of(settings) == found.choices[:n_choices]
        assert found.first(0.5).choices_of(settings) == found.choices[: round(2 * ratio)]
    assert found.choices_of(TrainSettings(retain_choices=0.5, retain_weight=0)) == ()


def test_questions_of_rows_that_may_be_held_out_are_not_retained() -> None:
    training, _ = starter_corpus().split(32)
    everything = {text for pair in training_choices("en", training) for text in pair}
    assert len(everything) == 2 * 96
    assert not everything & {text for pair in heldout_choices("en") for text in pair}
    some = training.limit(10)
    questions = {row["en"] for row in some.rows}
    answers = {training.answers["en"][question] for question in questions}
    asked = [text for pair in training_choices("en", some) for text in pair]
    assert len(asked) == 20
    for text in asked:
        question, _, rest = text.partition("\n\nWhich")
        assert question in questions
        a, b = (line.partition(". ")[2] for line in rest.splitlines()[1:3])
        assert {a, b} <= answers
    other = ParallelCorpus.make("other", [{"en": "one two", "sw": "moja mbili"}])
    assert len(training_choices("en", other)) == 96
    # Nor are those that are measured on without having been anyone's training rows.
    left = {text.partition("\n\nWhich")[0] for text, _ in training_choices("en", other, some)}
    assert left == {row["en"] for row in training.rows} - questions
    half = ParallelCorpus("half", some.rows[:5])
    assert len(training_choices("en", some, half)) == 5
    assert training_choices("hi", other) == []
    assert training_choices("en", training.limit(1)) == []


def test_questions_that_the_model_cannot_hold_are_not_retained(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, style = starter_corpus().split(32)[0], choose_format(llama.tokenizer, "auto")

    def lengths() -> list[int]:
        settings = [TrainSettings(retain_choices=1.0)]
        found = encode_shared(llama.tokenizer, style, corpus, ("en", "sw"), settings)
        return sorted(len(found.ids[prompt]) for prompt in found.choices)

    whole = lengths()
    monkeypatch.setattr(llama.tokenizer, "model_max_length", whole[40])
    assert lengths() == [one for one in whole if one <= whole[40]]


def test_settings_that_retain_questions_share_states_with_those_that_do_not(
    tiny_folder: Path,
) -> None:
    model, corpus = load_model(tiny_folder), starter_corpus().limit(4)
    subspaces = probe(model, corpus.to_corpus(), languages=("en", "sw"))
    settings = [TrainSettings(**COMMON, retain_choices=one) for one in (1.0, 0.0)]
    deltas = train(model, subspaces, corpus, settings=settings)
    assert [len(delta.metadata["log"]) for delta in deltas] == [1, 1]
    assert ["retain.choices" in delta.metadata["log"][0] for delta in deltas] == [True, False]
    for one, delta in zip(settings, deltas, strict=True):
        assert delta.metadata["n_rows"] == 4
        by_itself = train(model, subspaces, corpus, settings=one)
        for got, expected in zip(delta.metadata["log"], by_itself.metadata["log"], strict=True):
            assert got == pytest.approx(expected, rel=1e-4)
