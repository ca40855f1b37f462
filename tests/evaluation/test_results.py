import json

import pytest

from polylens.artefacts import read_json, write_json
from polylens.errors import CorruptFileError, StorageError
from polylens.evaluation.drift import StateChange
from polylens.evaluation.fidelity import Fidelity
from polylens.evaluation.results import (
    Answer,
    BeforeAfter,
    BitsPerByte,
    Evaluation,
    read_answers,
    write_answers,
)


def _evaluation():
    languages = ("en", "sw", "fr")
    return Evaluation(
        central="en",
        languages=("sw",),
        watched=("fr",),
        max_new_tokens=48,
        fidelity={
            language: BeforeAfter(
                Fidelity(4, 1, 0.25, 0.2165, {"en": 3, language: 1}, 1, 2),
                Fidelity(4, 3, 0.75, 0.2165, {"empty": 1, language: 3}, 0, 0),
            )
            for language in languages
        },
        bits_per_byte={language: BitsPerByte(1.5, 1.25, 4, 400) for language in languages},
        state_change={language: StateChange(0.01, 0.001, 0.02, 4) for language in languages},
    )


def test_a_summary_survives_its_file(tmp_path):
    evaluation = _evaluation()
    write_json(tmp_path / "summary.json", evaluation.to_dict())
    assert Evaluation.from_dict(read_json(tmp_path / "summary.json")) == evaluation


def test_the_summary_names_what_it_holds():
    values = json.loads(json.dumps(_evaluation().to_dict()))
    assert (values["central"], values["languages"], values["watched"]) == ("en", ["sw"], ["fr"])
    assert set(values["fidelity"]["sw"]["before"]) == {
        "n",
        "passed",
        "rate",
        "standard_error",
        "answered",
        "repeating",
        "echoing",
    }
    assert values["bits_per_byte"]["sw"] == {
        "before": 1.5,
        "after": 1.25,
        "n_texts": 4,
        "n_bytes": 400,
    }
    assert set(values["state_change"]["sw"]) == {"relative", "standard_error", "kl_bits", "n"}


def test_the_central_language_comes_first():
    assert _evaluation().all_languages == ("en", "sw", "fr")


def test_answers_survive_their_file(tmp_path):
    """Also with line breaks of every kind: U+0085, U+2028 and U+2029 stand unescaped in JSON."""
    texts = ["", "Habari?\nNzuri.", "a\u2028b\u2029c\x85d\x0ce\r", "مرحبا “你好”"]
    answers = [Answer("sw", i, "Habari?", text, "sw", True) for i, text in enumerate(texts)]
    write_answers(tmp_path / "before.jsonl", answers)
    assert read_answers(tmp_path / "before.jsonl") == answers


def test_no_answers_survive_their_file(tmp_path):
    write_answers(tmp_path / "before.jsonl", [])
    assert read_answers(tmp_path / "before.jsonl") == []


@pytest.mark.parametrize("content", [b'{"language": "sw"', b'{"tongue": "sw"}', b"[1]", b"\xff"])
def test_damaged_answers_are_noticed(tmp_path, content):
    path = tmp_path / "before.jsonl"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"before\.jsonl must hold answers, but is damaged"):
        read_answers(path)


def test_missing_answers_are_noticed(tmp_path):
    with pytest.raises(StorageError, match=r"none\.jsonl cannot be read"):
        read_answers(tmp_path / "none.jsonl")
