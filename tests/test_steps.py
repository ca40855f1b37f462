"""Training on answers, from corpora that have some and corpora that have none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from polylens.config import PRESETS, TrainSettings
from polylens.corpora import starter_corpus
from polylens.errors import CorpusError
from polylens.models.loading import load_model
from polylens.steps import probe, train

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
