"""`polylens mt-bench` and `polylens judge`, from questions to a verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from judge_server import Serve, failure, fair, serving
from tiny import save_tiny

pytest.importorskip("openai")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    with serving(monkeypatch) as start:
        yield start


def write_answers(name: str, grades: list[int]) -> str:
    """Answers that say which grade they deserve."""
    lines = [
        {
            "id": str(k),
            "category": "writing",
            "language": "en",
            "turns": [f"Write poem {k}.", "Rewrite it."],
            "answers": [f"{name} deserves {grade}"] * 2,
            "model": name,
        }
        for k, grade in enumerate(grades)
    ]
    Path(name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return name


def test_from_questions_to_a_verdict(run: Any, serve: Serve, tiny_folder: Path) -> None:
    questions = Path("questions.jsonl")
    questions.write_text(
        "".join(
            json.dumps({"question_id": k, "category": "writing", "turns": [f"Poem {k}", "Again"]})
            + "\n"
            for k in range(3)
        )
    )
    other = save_tiny(Path("other"), "qwen2")
    code, out, err = run(
        "mt-bench", tiny_folder, "--against", other, "--questions", questions, "--limit", 2,
        "--max-new-tokens", 3, "--out", "answers", "-l", "en",
    )  # fmt: skip
    assert code == 0, err
    assert "answers/before.jsonl (2 questions)" in out
    assert "polylens judge answers/before.jsonl answers/after.jsonl --endpoint" in out
    server = serve(lambda prompt: "[[B]]" if "[[C]]" in prompt else "[[4]]")
    judge = [
        "judge", "answers/before.jsonl", "answers/after.jsonl",
        "--endpoint", server.endpoint, "--judge", "m", "--out", "verdict",
    ]  # fmt: skip
    code, out, err = run(*judge)
    assert code == 0, err
    assert "Grades of m" in out
    assert "verdict/judgements.jsonl" in out
    n = len(server.bodies)
    code, out, err = run(*judge, "--json")
    assert code == 0, err
    assert len(server.bodies) == n
    summary = json.loads(out)
    assert summary == json.loads(Path("verdict/summary.json").read_text())
    assert summary["models"] == {"before": "other", "after": "tiny"}
    assert summary["now"]["requests"] == 0
    assert summary["total"]["requests"] == n


def test_tables(run: Any, serve: Serve) -> None:
    before, after = write_answers("old", [3, 4, 5, 6, 3]), write_answers("new", [5, 6, 7, 9, 3])
    server = serve(fair)
    judge = ["judge", before, after, "--endpoint", server.endpoint, "--judge", "m"]
    code, out, err = run(*judge, "--price-in", 1, "--price-out", 2)
    assert code == 0, err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    (grades,) = [line for line in lines if line.startswith("overall 5 ")]
    assert "4.20 (" in grades
    assert "6.00 (" in grades
    assert "+1.80 (" in grades
    assert any(line.startswith("overall 8 2 0 +0.80 (") for line in lines)
    assert "Both orders agree on 10 of 10 pairs" in out
    assert "All judgements: 40 requests, 4000 tokens in, 400 out, cost 0.0048." in out
    assert "Of these now: 40 requests" in out
    code, out, err = run("judge", before, "--endpoint", server.endpoint, "--judge", "m")
    assert code == 0, err
    assert "Of these now: 0 requests" in out
    assert "4.20" in out
    assert "wins" not in out


def test_unreadable_judgements_are_listed(run: Any, serve: Serve) -> None:
    server = serve(lambda prompt: "Well.")
    code, out, err = run(
        "judge", write_answers("old", [3]), "--endpoint", server.endpoint, "--judge", "m"
    )
    assert code == 0, err
    assert "2 judgements are unreadable and count nowhere: single: en 0, turn 1, before;" in out


def test_a_judge_that_stops_answering(run: Any, serve: Serve) -> None:
    left = [3]

    def say(prompt: str) -> Any:
        left[0] -= 1
        return fair(prompt) if left[0] >= 0 else failure(503)

    answers = write_answers("old", [3, 4, 5])
    judge = ["judge", answers, "--judge", "m", "--parallel", 1, "--retries", 0, "--endpoint"]
    code, out, err = run(*judge, serve(say).endpoint)
    assert code == 2
    assert out == ""
    assert "the 3 judgements so far are kept in runs/judge/judgements.jsonl" in err
    server = serve(fair)
    code, out, err = run(*judge, server.endpoint)
    assert code == 0, err
    assert len(server.bodies) == 3
    assert "All judgements: 6 requests" in out


def test_an_interruption_keeps_what_was_judged(run: Any, serve: Serve) -> None:
    import _thread

    n_asked = [0]

    def say(prompt: str) -> str:
        n_asked[0] += 1
        if n_asked[0] == 3:
            _thread.interrupt_main()
        return fair(prompt)

    answers = write_answers("old", [3, 4, 5, 6])
    judge = ["judge", answers, "--judge", "m", "--parallel", 1, "--endpoint"]
    code, _, err = run(*judge, serve(say).endpoint)
    assert code == 130
    assert "Interrupted. What was finished is kept" in err
    n_kept = len(Path("runs/judge/judgements.jsonl").read_text().splitlines())
    assert 2 <= n_kept < 8
    code, out, err = run(*judge, serve(fair).endpoint)
    assert code == 0, err
    assert f"Of these now: {8 - n_kept} requests" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["old", "--mode", "pairwise"], "pairs must have answers of two models, got one"),
        (["old", "--mode", "sngle"], "got 'sngle', did you mean 'single'?"),
        (["old", "new"], "1 have no answer after, the first is en 2"),
        (["old", "none"], "answers must be a JSONL file, but none is none"),
        (["empty"], "it is empty"),
        (["old", "--parallel", "0"], "parallel must be at least 1"),
        (["old", "--price-in", "1"], "both prices must be at least 0, or neither given"),
        (["old", "--endpoint", "localhost"], "the endpoint must be like http"),
        (["old"], "must be reachable at http://127.0.0.1:9/v1, but is not"),
    ],
)
def test_faulty_judging_ends_in_one_sentence(
    run: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write_answers("old", [3, 4, 5])
    write_answers("new", [3, 4])
    Path("empty").write_text("")
    if "--endpoint" not in arguments:
        arguments = [*arguments, "--endpoint", "http://127.0.0.1:9/v1"]
    code, out, err = run("judge", *arguments, "--judge", "m", "--retries", 0)
    assert message in " ".join(err.split())
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--questions", "none.jsonl"], "but none.jsonl is none; check the path"),
        (["--questions", "q.jsonl", "--strength", "1"], "--strength must go with a run or a delta"),
        (["--questions", "q.jsonl", "--strength", "-1"], "--strength must be at least 0"),
        (["--questions", "q.jsonl", "-l", "swahilli"], "did you mean 'swahili'?"),
        (["--questions", "q.jsonl", "--max-new-tokens", "999"], "lower --max-new-tokens"),
    ],
)
def test_faulty_mt_bench_ends_in_one_sentence(
    run: Any, tiny_folder: Path, arguments: list[str], message: str
) -> None:
    Path("q.jsonl").write_text('{"question_id": 1, "category": "x", "turns": ["Hello", "there"]}\n')
    code, out, err = run("mt-bench", tiny_folder, *arguments)
    assert message in " ".join(err.split())
    assert code == 2
    assert out == ""
    assert not Path("runs").exists()
