"""Judging against a real server on this machine: what is asked, kept, counted and made of it."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from judge_server import Answer, Serve, Server, completion, failure, fair, serving
from polylens.errors import CorruptFileError, MissingExtraError, UsageError
from polylens.evaluation.judge import JudgeSummary, judge_answers
from polylens.evaluation.judgements import Judge
from polylens.evaluation.mt_bench import Conversation, Question
from polylens.evaluation.verdicts import (
    PAIRWISE,
    SINGLE,
    ask_for_grade,
    ask_for_preference,
    read_grade,
    read_preference,
)

pytest.importorskip("openai")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    with serving(monkeypatch) as start:
        yield start


def conversations(n: int, grade: Callable[[int, int], int], model: str) -> list[Conversation]:
    """Answers that say which grade they deserve."""
    return [
        Conversation(
            Question(str(k), ("math", "writing")[k % 2], "en", (f"What is {k}?", "And now?")),
            tuple(f"{model} deserves {grade(k, turn)}" for turn in range(2)),
            model,
        )
        for k in range(n)
    ]


def judge_of(server: Server, **settings: Any) -> Judge:
    return Judge(endpoint=server.endpoint, model="m", **settings)


def judged(server: Server, n: int, path: Path, *, gain: int = 2, **settings: Any) -> JudgeSummary:
    before = conversations(n, lambda k, turn: 3 + k % 3, "old")
    after = conversations(n, lambda k, turn: 3 + k % 3 + gain * (turn == 0), "new")
    return judge_answers(judge_of(server, **settings), before, after, path)


def test_grades_and_preferences(serve: Serve, tmp_path: Path) -> None:
    server = serve(fair)
    found = judged(server, 12, tmp_path / "j.jsonl", input_price=2.0, output_price=10.0)
    grades = {(one.side, one.group): one for one in found.grades}
    assert grades["before", "overall"].mean == 4
    assert grades["after", "turn 1"].mean == 6
    assert grades["after", "overall"].mean == 5  # the mean of both turns is one value
    assert grades["after", "overall"].n == 12
    assert grades["after", "category math"].n == 6
    assert grades["before", "overall"].low < 4 < grades["before", "overall"].high
    changes = {one.task.name: one.change for one in found.changes}
    assert list(changes) == ["overall", "turn 1", "turn 2", "category math", "category writing"]
    assert (changes["turn 1"].difference, changes["turn 2"].difference) == (2, 0)
    preferences = {one.group: one for one in found.preferences}
    assert [
        (one.wins, one.ties, one.losses) for one in (preferences["turn 1"], preferences["turn 2"])
    ] == [(12, 0, 0), (0, 12, 0)]
    overall = preferences["overall"]
    assert (overall.wins, overall.ties, overall.losses) == (12, 12, 0)
    assert overall.rates.difference == 0.5
    assert overall.rates.n == 12
    assert preferences["turn 2"].rates.low < 0 < preferences["turn 2"].rates.high
    assert (found.n_agreeing, found.n_pairs, found.n_identical) == (24, 24, 0)
    assert found.unreadable == ()
    assert found.models == {"before": "old", "after": "new"}
    assert found.now == found.total
    assert found.total.requests == len(server.bodies) == 12 * 2 * (2 + 2)
    assert (found.total.input_tokens, found.total.output_tokens) == (9600, 960)
    assert found.total.cost == pytest.approx((9600 * 2 + 960 * 10) / 1e6)
    assert {body["temperature"] for body in server.bodies} == {0}
    assert {body["seed"] for body in server.bodies} == {0}
    assert set(server.keys) == {"Bearer none"}
    json.dumps(found.to_dict())


def test_a_second_run_asks_nothing(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, path = serve(fair), tmp_path / "j.jsonl"
    first = judged(server, 3, path)
    n, content = len(server.bodies), path.read_bytes()
    monkeypatch.setitem(sys.modules, "openai", None)  # not even the client is needed
    again = judged(server, 3, path)
    assert len(server.bodies) == n
    assert path.read_bytes() == content
    assert again.now.requests == 0
    assert again.total == first.total
    assert again.grades == first.grades
    assert again.preferences == first.preferences


def test_without_the_client_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    judge = Judge("http://127.0.0.1:1/v1", "m")
    with pytest.raises(MissingExtraError, match=r"pip install 'polylens\[judge\]'"):
        judge_answers(judge, conversations(1, lambda *_: 3, "old"), None, tmp_path / "j.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_judge_that_prefers_a_position_finds_ties_alone(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda prompt: "[[A]]" if "[[C]]" in prompt else "[[5]]")
    found = judged(server, 4, tmp_path / "j.jsonl")
    (overall, *_) = found.preferences
    assert (overall.wins, overall.ties, overall.losses) == (0, 8, 0)
    assert overall.rates.difference == 0
    assert (found.n_agreeing, found.n_pairs) == (0, 8)


def test_identical_answers_are_ties_without_asking(serve: Serve, tmp_path: Path) -> None:
    server = serve(fair)
    before = conversations(3, lambda k, turn: 5, "same")
    found = judge_answers(judge_of(server), before, before, tmp_path / "j.jsonl")
    assert len(server.bodies) == 6  # each answer is graded once, for both sides
    assert found.n_identical == 6
    assert found.n_pairs == 0
    assert [one.ties for one in found.preferences if one.group == "overall"] == [6]
    assert {one.change.difference for one in found.changes} == {0}


def test_failures_that_pass_are_waited_for(serve: Serve, tmp_path: Path) -> None:
    told = iter([failure(429, **{"Retry-After": "1"}), failure(500), failure(503)])
    server = serve(lambda prompt: next(told, None) or fair(prompt))
    one = conversations(1, lambda *_: 7, "old")
    found = judge_answers(judge_of(server, parallel=1), one, None, tmp_path / "j.jsonl")
    assert found.grades[0].mean == 7
    assert found.total.requests == 2
    assert len(server.bodies) == 5


def test_the_wait_that_the_server_asks_for_is_kept(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import anyio

    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    told = iter([failure(429, **{"Retry-After": "7"}), failure(500), failure(500)])
    server = serve(lambda prompt: next(told, None) or fair(prompt))
    one = conversations(1, lambda *_: 7, "old")
    judge_answers(judge_of(server, parallel=1), one, None, tmp_path / "j.jsonl")
    assert slept[0] == 7
    assert slept[1] < slept[2]


def test_failures_that_stay_end_in_one_sentence(serve: Serve, tmp_path: Path) -> None:
    one = conversations(1, lambda *_: 7, "old")
    cases: list[tuple[Answer, str]] = [
        (failure(500), r"refuses after 0 retries \(Error code: 500"),
        (failure(429, "slow down"), r"Error code: 429.*slow down"),
        (failure(401, "key sk-1"), "the key in OPENAI_API_KEY must be one that .* answered 401;"),
        (failure(404, "no such model"), "must serve chat completions of 'm', but answered 404"),
        ((200, {}, {"hello": 1}), "must answer as OpenAI's chat completions do"),
        ((200, {"Content-Type": "text/html"}, "hello"), "as OpenAI's chat completions do"),
    ]
    for answer, message in cases:
        server = serve(lambda _, answer=answer: answer)
        with pytest.raises(UsageError, match=message) as caught:
            judge_answers(judge_of(server, max_retries=0), one, None, tmp_path / "j.jsonl")
        assert "there are no judgements so far; mend this and run the same command again" in str(
            caught.value
        )
        assert "sk-1" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_server_is_not_waited_for_for_ever(serve: Serve, tmp_path: Path) -> None:
    end = threading.Event()

    def wait(prompt: str) -> str:
        end.wait(20)
        return fair(prompt)

    one = conversations(1, lambda *_: 7, "old")
    judge = judge_of(serve(wait), max_retries=0, timeout_seconds=0.2)
    with pytest.raises(UsageError, match=r"must answer within 0.2 s, but http://127"):
        judge_answers(judge, one, None, tmp_path / "j.jsonl")
    end.set()


def test_a_server_that_dies_leaves_what_it_judged(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    left = [9]

    def say(prompt: str) -> str | Answer:
        left[0] -= 1
        return fair(prompt) if left[0] >= 0 else failure(500)

    with pytest.raises(UsageError, match=rf"the 9 judgements so far are kept in {path}"):
        judged(serve(say), 5, path, max_retries=0, parallel=2)
    assert len(path.read_text().splitlines()) == 9
    path.write_bytes(path.read_bytes() + b'{"key": "cut sh')  # as a kill leaves it
    server = serve(fair)
    found = judged(server, 5, path)
    assert len(server.bodies) == found.now.requests == 40 - 9
    assert found.total.requests == 40
    assert all(json.loads(line)["reply"] for line in path.read_text().splitlines())
    assert judged(server, 5, path).now.requests == 0


def test_an_unreachable_server(tmp_path: Path, serve: Serve) -> None:
    server = serve(fair)
    server.shutdown()
    server.server_close()
    with pytest.raises(UsageError, match=r"must be reachable at http://127.*, but is not \("):
        judged(server, 1, tmp_path / "j.jsonl", max_retries=0)


def test_unreadable_verdicts_are_asked_for_again_then_counted(serve: Serve, tmp_path: Path) -> None:
    def say(prompt: str) -> str:
        if "What is 0?" in prompt:
            return "I would rather not say."
        if "What is 1?" in prompt and "Write nothing but" not in prompt:
            return "Hm."
        return fair(prompt)

    server, path = serve(say), tmp_path / "j.jsonl"
    found = judged(server, 3, path)
    # One question has no verdict in 8 requests, asked twice; one gives all of them at the second.
    assert found.total.requests == len(server.bodies) == 8 * (2 + 2 + 1)
    assert len(found.unreadable) == 8
    assert found.unreadable[0] == "single: en 0, turn 1, before"
    assert {one.n for one in found.grades if one.group == "overall"} == {2}
    assert found.n_pairs == 4
    again = judged(server, 3, path)
    assert again.now.requests == 0
    assert again.unreadable == found.unreadable


def test_a_parameter_that_the_server_refuses_is_left_out(serve: Serve, tmp_path: Path) -> None:
    def say(prompt: str) -> str | Answer:
        if "temperature" in server.bodies[-1]:
            return 400, {}, {"error": {"message": "unsupported", "param": "temperature"}}
        return fair(prompt)

    server = serve(say)
    one = conversations(2, lambda *_: 7, "old")
    found = judge_answers(judge_of(server, parallel=2), one, None, tmp_path / "j.jsonl")
    assert found.grades[0].mean == 7
    assert {"seed", "max_tokens"} <= server.bodies[-1].keys()
    assert found.total.requests == 4


def test_without_tokens_there_is_no_cost(serve: Serve, tmp_path: Path) -> None:
    def say(prompt: str) -> Answer:
        return 200, {}, {**completion(fair(prompt)), "usage": None}

    one = conversations(1, lambda *_: 7, "old")
    judge = judge_of(serve(say), input_price=1.0, output_price=1.0)
    assert judge_answers(judge, one, None, tmp_path / "j.jsonl").total.cost is None


def test_the_key_is_sent(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    server = serve(fair)
    judge_answers(
        judge_of(server), conversations(1, lambda *_: 7, "old"), None, tmp_path / "j.jsonl"
    )
    assert set(server.keys) == {"Bearer abc"}
    assert "abc" not in (tmp_path / "j.jsonl").read_text()


def test_sides_must_answer_the_same_questions(tmp_path: Path) -> None:
    judge = Judge("http://127.0.0.1:1/v1", "m")
    three, two = (conversations(n, lambda *_: 7, "old") for n in (3, 2))
    for before, after, message in (
        (three, two, "1 have no answer after, the first is en 2"),
        (two, three, "1 have no answer before, the first is en 2"),
    ):
        with pytest.raises(UsageError, match=message):
            judge_answers(judge, before, after, tmp_path / "j.jsonl")
    other = [Conversation(Question("0", "math", "en", ("x", "y")), ("a", "b"), "new"), three[1]]
    with pytest.raises(UsageError, match="0 has other texts before than after"):
        judge_answers(judge, two, other, tmp_path / "j.jsonl")
    with pytest.raises(UsageError, match="answers of two models, got one"):
        judge_answers(judge, two, None, tmp_path / "j.jsonl", modes=[PAIRWISE])


def test_damaged_judgements(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    judge = Judge("http://127.0.0.1:1/v1", "m")
    for content in ("nonsense\n", '{"key": "a"}\n', "[]\n"):
        path.write_text(content)
        with pytest.raises(CorruptFileError, match="must hold one judgement a line"):
            judge_answers(judge, conversations(1, lambda *_: 7, "old"), None, path)


def test_any_reply_can_be_kept(serve: Serve, tmp_path: Path) -> None:
    server, path = serve(lambda _: "\ud83d\u2028 好 [[7]]"), tmp_path / "j.jsonl"
    for n_asked in (2, 0):
        one = conversations(1, lambda *_: 7, "old")
        found = judge_answers(judge_of(server), one, None, path)
        assert found.now.requests == n_asked
        assert found.grades[0].mean == 7


def test_settings_are_checked_together() -> None:
    with pytest.raises(UsageError) as caught:
        Judge("localhost:8000", " ", parallel=0, max_retries=-1, timeout_seconds=0, input_price=1)
    for fault in ("endpoint", "named", "parallel", "max_retries", "timeout_seconds", "prices"):
        assert fault in str(caught.value)


def test_prompts() -> None:
    right = Question("1", "math", "en", ("2 + 2?", "Twice that?"), ("Four.", ""))
    said = Conversation(right, ("It is {4}.", "It is 8."), "old")
    other = Conversation(right, ("Five.", "Ten."), "new")
    first, second = (ask_for_grade(said, turn, "").prompt for turn in range(2))
    assert "It is {4}." in first
    assert "It is 8." not in first
    assert "Twice that?" not in first
    assert first.count("<reference>") == second.count("<reference>") == 1
    assert second.index("It is {4}.") < second.index("Twice that?") < second.index("It is 8.")
    pair = ask_for_preference(said, other, 0, "").prompt
    assert pair.index("It is {4}.") < pair.index("Five.")
    free = Question("1", "writing", "en", right.turns, right.reference)
    assert "Four." not in ask_for_grade(Conversation(free, ("a", "b"), "old"), 0, "").prompt


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("[[7]]", 7),
        ("[[ 7.5 ]]", 7.5),
        ("Rating: [[7]]", 7),
        ("[[Rating: 7]]", 7),
        ("[[7/10]]", 7),
        ("**Rating**: 7", 7),
        ("Rating: **7**/10", 7),
        ("Score: 7.5/10, since", 7.5),
        ("The grade is 10.", 10),
        ("I give it 8 out of 10.", 8),
        ("4/10 at first, but in all [[7]]", 7),
        ("<think>[[3]]? No.</think>[[7]]", 7),
        ("[[7]] I repeat: [[7]]", 7),
        ("Grade: 1 to 10", None),
        ("Score: 85 out of 100", None),
        ("between 6/10 and 8/10", None),
        ("[[0]]", None),
        ("[[-3]]", None),
        ("on 3/10/2024", None),
        ("[[number]]", None),
        ("", None),
    ],
)
def test_grades_are_read_not_guessed(reply: str, grade: float | None) -> None:
    assert read_grade(reply) == grade


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("[[A]]", "A"),
        ("**[[B]]**", "B"),
        ("[[tie]]", "C"),
        ("[[Assistant B]]", "B"),
        ("Final verdict: B", "B"),
        ("The winner is Assistant A.", "A"),
        ("[[A]] or [[B]]", None),
        ("A is better", None),
        ("The verdict is a matter of taste", None),
        ("", None),
    ],
)
def test_preferences_are_read_not_guessed(reply: str, letter: str | None) -> None:
    assert read_preference(reply) == letter


def test_modes(serve: Serve, tmp_path: Path) -> None:
    server = serve(fair)
    before, after = (conversations(2, lambda *_: 7, name) for name in ("old", "new"))
    single = judge_answers(judge_of(server), before, after, tmp_path / "a.jsonl", modes=[SINGLE])
    assert single.grades
    assert single.changes
    assert single.preferences == ()
    pairwise = judge_answers(
        judge_of(server), before, after, tmp_path / "b.jsonl", modes=[PAIRWISE]
    )
    assert pairwise.grades == pairwise.changes == ()
    assert pairwise.preferences
    assert len(server.bodies) == 8 + 8
