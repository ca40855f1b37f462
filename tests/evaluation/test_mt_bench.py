"""MT-Bench: what is read, what the second turn sees, and that nothing is answered twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polylens.config import Runtime
from polylens.crown import CrownDelta
from polylens.errors import CorpusError, LanguageError, UsageError
from polylens.evaluation import mt_bench
from polylens.evaluation.mt_bench import (
    Question,
    answer_sides,
    read_conversations,
    read_questions,
)
from polylens.evaluation.sides import Side, choose_sides
from polylens.models import load_model
from polylens.prompts import choose_format
from tiny import CHAT_TEMPLATE, save_tiny, tiny_tokenizer

ROWS = [
    {"question_id": 81 + k, "category": "math", "turns": [f"What is {k} + 2?", "And twice that?"]}
    for k in range(5)
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return read_questions(write(tmp_path / "questions.jsonl", ROWS))


@pytest.fixture
def delta(tiny_folder: Path, tmp_path: Path) -> Path:
    model = load_model(tiny_folder)
    name = model.structure.parameter_name(3, "mlp.down_proj.weight")
    change = -2 * model.causal_lm.get_parameter(name).detach().clone()
    metadata = {"model": model.name, "fingerprint": model.fingerprint, "layers": [3]}
    CrownDelta({name: change}, metadata).save(tmp_path / "delta.safetensors")
    return tmp_path / "delta.safetensors"


def test_questions(tmp_path: Path) -> None:
    rows = [
        ROWS[0],
        {**ROWS[1], "reference": ["3", ""]},
        {**ROWS[2], "language": "zho", "id": "x"},
        {**ROWS[0], "language": "sw"},  # the same id, of another language
    ]
    found = read_questions(write(tmp_path / "q.jsonl", rows))
    assert [(one.id, one.language) for one in found] == [
        ("81", "en"), ("82", "en"), ("83", "zh"), ("81", "sw")
    ]  # fmt: skip
    assert found[0].turns == ("What is 0 + 2?", "And twice that?")
    assert found[1].reference == ("3", "")
    assert read_questions(tmp_path / "q.jsonl", "ja")[0].language == "ja"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "it is empty"),
        (["x"], "must be a JSON object"),
        ([{**ROWS[0], "turns": ["one"]}], "line 1 of .* must have 'turns' as a list of 2 texts"),
        ([ROWS[0], {**ROWS[1], "turns": 3}], "line 2 of .* must have 'turns'"),
        ([{**ROWS[0], "turns": ["one", " "]}], "turns with text in them"),
        ([{**ROWS[0], "reference": "4"}], "must have 'reference' as a list"),
        ([{"category": "math", "turns": ["a", "b"]}], "must have an id and a category"),
        ([ROWS[0], ROWS[0]], "'81' occurs twice in en"),
        ([{**ROWS[0], "language": 3}], "must have a language, got 3"),
    ],
)
def test_faulty_questions(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        read_questions(write(tmp_path / "q.jsonl", rows), "en")


def test_files_that_hold_no_questions(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("nonsense\n")
    with pytest.raises(CorpusError, match=r"line 1 of .* must be JSON"):
        read_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CorpusError, match="must be UTF-8"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(CorpusError, match="is none; check the path"):
        read_questions(tmp_path / "none.jsonl")
    write(tmp_path / "q.jsonl", [{**ROWS[0], "turns": ["1", "2"]}])
    with pytest.raises(CorpusError, match=r"the language of .* must be stated"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(LanguageError, match="did you mean"):
        read_questions(tmp_path / "q.jsonl", "swahilli")


def test_the_second_turn_sees_the_first_answer(
    questions: list[Question], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    asked: list[list[str]] = []

    def generate(model: Any, prompts: Any, **_: Any) -> list[str]:
        asked.append([tokenizer.decode(ids) for ids in prompts])
        return [f"answer {len(asked)}.{n}" for n in range(len(prompts))]

    monkeypatch.setattr(mt_bench, "generate_answers", generate)
    sides = [Side("after", str(tiny_folder))]
    (path,) = answer_sides(sides, questions, tmp_path, Runtime(), max_new_tokens=9)
    chat = choose_format(tokenizer)
    assert chat.template == CHAT_TEMPLATE
    assert asked[0][1] == chat.render(tokenizer, "What is 1 + 2?")
    assert asked[1][1] == (
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\nanswer 1.1<|im_end|>\n"
        "<|im_start|>user\nAnd twice that?<|im_end|>\n<|im_start|>assistant\n"
    )
    (_, second, *_) = read_conversations(path)
    assert second.answers == ("answer 1.1", "answer 2.1")
    assert second.question == questions[1]
    line = json.loads(path.read_text().splitlines()[1])
    assert line == {
        "id": "82",
        "category": "math",
        "language": "en",
        "turns": ["What is 1 + 2?", "And twice that?"],
        "answers": ["answer 1.1", "answer 2.1"],
        "model": "tiny",
    }


def test_a_model_without_template_reads_the_texts(
    questions: list[Question], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        mt_bench, "generate_answers", lambda _, prompts, **__: asked.append(prompts) or ["so"]
    )
    sides = [Side("after", str(tiny_folder))]
    answer_sides(sides, questions, tmp_path, Runtime(), limit=1, template="plain", max_new_tokens=9)
    text = tiny_tokenizer().decode(asked[1][0])
    assert text == "What is 0 + 2?\n\nso\n\nAnd twice that?"


def test_before_and_after(
    delta: Path, questions: list[Question], tiny_folder: Path, tmp_path: Path
) -> None:
    sides = choose_sides(str(delta), str(tiny_folder), [0.5])
    before, after = answer_sides(sides, questions, tmp_path / "out", Runtime(), max_new_tokens=4)
    assert (before.name, after.name) == ("before.jsonl", "after.jsonl")
    old, new = read_conversations(before), read_conversations(after)
    assert [one.question for one in old] == [one.question for one in new] == questions
    assert [one.answers for one in old] != [one.answers for one in new]
    assert (old[0].model, new[0].model) == ("tiny", "tiny + delta at 0.5")
    sides = choose_sides(str(delta), str(tiny_folder), [0])
    before, after = answer_sides(sides, questions, tmp_path / "zero", Runtime(), max_new_tokens=4)
    answers = [[one.answers for one in read_conversations(path)] for path in (before, after)]
    assert answers[0] == answers[1]


def test_a_delta_of_another_model_stops_before_the_first_answer(
    delta: Path, questions: list[Question], tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", "qwen2")
    sides = choose_sides(str(delta), str(other), None)
    with pytest.raises(UsageError, match="belongs to another one"):
        answer_sides(sides, questions, tmp_path / "out", Runtime(), max_new_tokens=2)
    assert not (tmp_path / "out").exists()


def test_it_goes_on_where_it_was(
    questions: list[Question], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mt_bench, "_CHUNK", 2)
    answered = []
    real = mt_bench.generate_answers

    def generate(model: Any, prompts: Any, **keywords: Any) -> list[str]:
        if len(answered) == 3:
            raise KeyboardInterrupt
        answered.append(len(prompts))
        return real(model, prompts, **keywords)

    monkeypatch.setattr(mt_bench, "generate_answers", generate)
    sides, out = [Side("after", str(tiny_folder))], tmp_path / "out"
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int, what: str) -> None:
        if what.startswith("questions"):
            told.append((done, total))

    with pytest.raises(KeyboardInterrupt):
        answer_sides(sides, questions, out, Runtime(), max_new_tokens=2)
    assert len(read_conversations(out / "after.jsonl")) == 2
    monkeypatch.setattr(mt_bench, "generate_answers", real)
    (path,) = answer_sides(sides, questions, out, Runtime(), max_new_tokens=2, progress=progress)
    assert told == [(2, 5), (4, 5), (5, 5)]
    whole = path.read_bytes()
    alone = answer_sides(sides, questions, tmp_path / "alone", Runtime(), max_new_tokens=2)
    assert alone[0].read_bytes() == whole
    answer_sides(sides, questions, out, Runtime(), max_new_tokens=2, limit=3)
    assert path.read_bytes() == whole  # fewer questions lose no answers


def test_answers_of_something_else_are_not_mixed_in(
    questions: list[Question], tiny_folder: Path, tmp_path: Path
) -> None:
    sides, out = [Side("after", str(tiny_folder))], tmp_path / "out"
    answer_sides(sides, questions, out, Runtime(), max_new_tokens=2, limit=1)
    for others, n in ((questions, 3), (questions[1:], 2)):
        with pytest.raises(UsageError, match=r"its after.json tells of others"):
            answer_sides(sides, others, out, Runtime(), max_new_tokens=n, limit=1)
    (out / "after.json").unlink()
    with pytest.raises(UsageError, match=r"must be new or have after.json beside it"):
        answer_sides(sides, questions, out, Runtime(), max_new_tokens=2, limit=1)


def test_conversations_must_fit_in_the_context(
    questions: list[Question], tiny_folder: Path, tmp_path: Path
) -> None:
    sides = [Side("after", str(tiny_folder))]
    with pytest.raises(UsageError, match=r"context of 512 tokens, but question 81 needs up to"):
        answer_sides(sides, questions, tmp_path / "out", Runtime(), max_new_tokens=250)
    assert not (tmp_path / "out").exists()
