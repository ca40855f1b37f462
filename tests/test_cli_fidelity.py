"""`polylens fidelity`: answers from files, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ARABIC = "لم يتوقف المطر في الجبال حتى المساء فبقينا في البيت نشرب الشاي."
ENGLISH = "The rain in the mountains did not stop until the evening."


def write(name: str, *answers: str, language: str = "ar") -> Path:
    rows = [
        {"language": language, "prompt": f"سؤال {n}", "answer": answer}
        for n, answer in enumerate(answers)
    ]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(name)


def test_a_file_alone_and_against_another(run: Any) -> None:
    after = write("after.jsonl", *[ARABIC] * 8)
    before = write("before.jsonl", *[ENGLISH] * 7, ARABIC)
    code, out, err = run("fidelity", after, "--against", before, "--out", "verdicts")
    assert code == 0, err
    assert "Arabic (ar)" in out
    assert "asked ↓, answered →" in out
    assert "+0.875" in out
    result = json.loads(Path("verdicts/fidelity.json").read_text())
    assert result["difference"][0]["p_corrected"] == pytest.approx(2 / 2**7)
    assert result["answers"][0]["line"]["rate"] == 1
    (line, *others) = Path("verdicts/verdicts.jsonl").read_text().splitlines()
    assert json.loads(line)["answered"] == "ar"
    assert len(others) == 7


def test_answers_of_evaluate(run: Any) -> None:
    Path("card").mkdir()
    row = {"key": "0", "value": 1.0, "prompt": "x", "target": "ar", "responses": {"answer": ARABIC}}
    Path("card/fidelity_ar.jsonl").write_text(json.dumps(row))
    code, out, err = run("fidelity", "card", "--json")
    assert code == 0, err
    assert json.loads(out)["answers"][0]["line"]["passed"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{", "line 1 of a.jsonl must be JSON"),
        ('{"language": "ar"}', "line 1 of a.jsonl must hold 'answer' as text"),
        ('{"answer": "x"}', "must hold 'language' as text"),
        ("[1]", "must hold 'language' as text"),
        ('{"language": "swahilli", "answer": "x"}', "did you mean 'swahili'?"),
        ('{"language": "ar", "answer": "x", "setting": "other"}', "monolingual or crosslingual"),
    ],
)
def test_faulty_answers(run: Any, content: str, message: str) -> None:
    Path("a.jsonl").write_text(content)
    code, out, err = run("fidelity", "a.jsonl", "--out", "verdicts")
    assert message in " ".join(err.split())
    assert (code, out) == (2, "")
    assert not Path("verdicts").exists()


def test_missing_rows(run: Any) -> None:
    answers = write("a.jsonl", ARABIC, ARABIC)
    Path("p.csv").write_text("prompt,language\nسؤال 0,ar\nسؤال 1,ar\nسؤال 2,ar\n")
    code, _, err = run("fidelity", answers, "--prompts", "p.csv")
    assert code == 2
    assert "a.jsonl lacks 1 of 3, the first is 'سؤال 2'" in " ".join(err.split())
    code, _, err = run("fidelity", answers, "--against", write("b.jsonl", ARABIC))
    assert code == 2
    assert "both files must answer the same prompts" in " ".join(err.split())
    code, _, err = run("fidelity", "none.jsonl")
    assert code == 2
    code, _, err = run("fidelity", answers, "--detector", answers)
    assert code == 2
    assert "must be a fastText model" in " ".join(err.split())
