"""What a judge is asked about open answers, and how its verdict is read.

A grade is a number from 1 to 10, a preference "A", "B" or "C" (a tie). A judgement without a
verdict, or with several, is unreadable: nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from polylens.evaluation.mt_bench import Conversation

Mode = Literal["single", "pairwise"]
SINGLE: Mode = "single"
PAIRWISE: Mode = "pairwise"

# Where a right answer exists, judges grade better with it at hand.
_WITH_REFERENCE = frozenset(("math", "coding", "reasoning"))

_SINGLE_PROMPT = """\
Below is a conversation between a user and an assistant. Grade the assistant's last answer.

Ask of the answer: Is it true, and free of mistakes? Does it do what the user asked, all of it and \
nothing else? Is it in the language that the user writes, unless another one was asked for? Is it \
clear and useful? A long answer is not better for its length.
{reference}
{conversation}

Give your reasons in a few sentences. Then write, on a line of its own, a whole number from 1 \
(worthless) to 10 (could not be better) in double square brackets, in this form: [[number]]"""

_PAIRWISE_PROMPT = """\
Below, the same user talks to two assistants, A and B. Decide which one gave the better last answer.

Ask of both answers: Is it true, and free of mistakes? Does it do what the user asked, all of it \
and nothing else? Is it in the language that the user writes, unless another one was asked for? Is \
it clear and useful? Neither length nor the order in which they stand here makes an answer better.
{reference}
Assistant A:
{first}

Assistant B:
{second}

Give your reasons in a few sentences. Then write your verdict on a line of its own, in this form: \
[[A]] if the answer of A is better, [[B]] if that of B is, [[C]] if they are equally good."""

_REFERENCE = """
These answers are known to be right; the assistant may word them otherwise:
{answers}
"""

_FIRMER: dict[Mode, str] = {
    SINGLE: "\n\nWrite nothing but the number in double square brackets.",
    PAIRWISE: "\n\nWrite nothing but the letter in double square brackets.",
}

_NUMBER = r"(\d+(?:\.\d+)?)"
_BRACKETED_GRADE = re.compile(rf"\[\[\D{{0,12}}?(?<!-){_NUMBER}\s*(?:/\s*10\s*)?\]\]")
_LOOSE_GRADES = (
    re.compile(rf"(?<![\d.\-]){_NUMBER}\s*(?:/|out of)\s*10\b(?!\s*/|\.\d)", re.I),
    re.compile(
        rf"\b(?:rating|score|grade)\s*(?:is|of|:|=)\s*\[?{_NUMBER}"
        r"(?!\d|/|\.\d|\s*(?:to|or|[-–])\s*\d)",
        re.I,
    ),
)
_BRACKETED_PREFERENCE = re.compile(r"\[\[\s*(?:(?i:assistant|answer)\s+)?([ABC]|(?i:tie))\s*\]\]")
_LOOSE_PREFERENCES = (
    re.compile(
        r"\b(?i:verdict|winner|better answer|better assistant)\s*(?i:is|:|=)\s*\[?"
        r"(?:(?i:assistant|answer)\s+)?([ABC]|(?i:tie))\b"
    ),
)


@dataclass(frozen=True)
class JudgeQuestion:
    """One thing to ask the judge.

    Attributes:
        mode: what is asked.
        prompt: in these words.
        label: for people.
    """

    mode: Mode
    prompt: str
    label: str

    @property
    def wordings(self) -> tuple[str, str]:
        """The prompt, and the one that is sent if its answer holds no verdict."""
        return self.prompt, self.prompt + _FIRMER[self.mode]


def ask_for_grade(conversation: Conversation, turn: int, label: str) -> JudgeQuestion:
    """Ask for the grade of an answer.

    Args:
        conversation: what was said; shown up to the answer.
        turn: of the answer, from 0.
        label: for people.
    """
    prompt = _SINGLE_PROMPT.format(
        reference=_reference(conversation, turn), conversation=render(conversation, turn)
    )
    return JudgeQuestion(SINGLE, prompt, label)


def ask_for_preference(
    first: Conversation, second: Conversation, turn: int, label: str
) -> JudgeQuestion:
    """Ask which of two answers to one question is better.

    Args:
        first: the conversation that is shown as A's.
        second: and as B's.
        turn: of the answers, from 0.
        label: for people.
    """
    prompt = _PAIRWISE_PROMPT.format(
        reference=_reference(first, turn), first=render(first, turn), second=render(second, turn)
    )
    return JudgeQuestion(PAIRWISE, prompt, label)


def render(conversation: Conversation, turn: int) -> str:
    """Write a conversation out, up to the answer of a turn."""
    parts = []
    for number in range(turn + 1):
        parts.append(f"<user>\n{conversation.question.turns[number]}\n</user>")
        parts.append(f"<assistant>\n{conversation.answers[number]}\n</assistant>")
    return "\n".join(parts)


def _reference(conversation: Conversation, turn: int) -> str:
    question = conversation.question
    known = [text for text in question.reference[: turn + 1] if text.strip()]
    if question.category not in _WITH_REFERENCE or not known:
        return ""
    answers = "\n".join(f"<reference>\n{text}\n</reference>" for text in known)
    return _REFERENCE.format(answers=answers)


def read_grade(reply: str) -> float | None:
    """Return the grade that a judgement states, or None if it states none, or several.

    Example:
        >>> [read_grade(text) for text in ("Good. [[7]]", "**Rating:** 7.5", "I say 7/10.")]
        [7.0, 7.5, 7.0]
        >>> [read_grade(text) for text in ("It is good.", "[[11]]", "[[3]] or [[4]]")]
        [None, None, None]
    """
    found = {float(number) for number in _stated(reply, _BRACKETED_GRADE, _LOOSE_GRADES)}
    grade = found.pop() if len(found) == 1 else None
    return grade if grade is not None and 1 <= grade <= 10 else None


def read_preference(reply: str) -> str | None:
    """Return "A", "B" or "C" (a tie), or None if a judgement states none, or several.

    Example:
        >>> [read_preference(text) for text in ("So [[B]]", "Verdict: A", "[[Tie]]", "A or B?")]
        ['B', 'A', 'C', None]
    """
    found = {
        "C" if letter.lower() == "tie" else letter
        for letter in _stated(reply, _BRACKETED_PREFERENCE, _LOOSE_PREFERENCES)
    }
    return found.pop() if len(found) == 1 else None


def _stated(
    reply: str, bracketed: re.Pattern[str], loose: Sequence[re.Pattern[str]]
) -> Sequence[str]:
    """Return all that is stated in the form asked for, or else in a looser one."""
    text = reply.rpartition("</think>")[2]  # what a model thinks aloud is not its verdict
    text = re.sub(r"[*_`\"]|\\boxed", "", text)
    return bracketed.findall(text) or [one for form in loose for one in form.findall(text)]


READERS: dict[Mode, Callable[[str], float | str | None]] = {
    SINGLE: read_grade,
    PAIRWISE: read_preference,
}
