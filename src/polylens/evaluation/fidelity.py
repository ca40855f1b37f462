"""Language fidelity: is an answer in the language of its question?

An answer passes when the language detected in it is the one asked for. One that is empty, or too
short to judge, counts among the answers and does not pass: whoever asked got no answer in the
language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from polylens.detection import LanguageDetector

# A text of which more than half of the 4-grams of words (of characters, where there are few spaces)
# have occurred before in it says the same thing again and again.
_GRAM = 4
_REPEATING_RATIO = 0.5

# So does one that ends in the same words so many times in a row, and in at least so many words or
# characters: greedy decoding does not leave such a loop, and a limit cuts it off before the 4-grams
# would show it.
_LOOPS = 3
_LOOP_WORDS = 4
_LOOP_CHARACTERS = 8

# An answer that begins with so much of its question, in letters, says the question again. Fewer
# letters than these begin many an answer by chance.
_ECHO_RATIO = 0.8
_ECHO_LETTERS = 4


@dataclass(frozen=True)
class Fidelity:
    """How many answers are in the language asked for.

    Attributes:
        n: answers, whatever they are.
        passed: those detected to be in the language of the question. Higher is better.
        rate: passed / n, 0 to 1. Higher is better.
        standard_error: of `rate`, binomial: sqrt(rate · (1 - rate) / n).
        answered: detected language → answers; "unknown" for those too short to judge, "empty" for
            those without any text. They add up to `n`.
        repeating: answers that repeat themselves, see `is_repeating`. Lower is better.
        echoing: answers that begin by repeating the question, see `is_echo`. Lower is better.
    """

    n: int
    passed: int
    rate: float
    standard_error: float
    answered: Mapping[str, int]
    repeating: int
    echoing: int


def detect_answers(answers: Sequence[str], detector: LanguageDetector) -> list[str]:
    """Return each answer's language; "unknown" if too short to judge, "empty" without any text."""
    return [
        (detector.detect(answer) or "unknown") if answer.strip() else "empty" for answer in answers
    ]


def measure_fidelity(
    asked: str, prompts: Sequence[str], answers: Sequence[str], detected: Sequence[str]
) -> Fidelity:
    """Count the answers in the language asked for.

    Args:
        asked: the language of the questions.
        prompts: those questions, at least one.
        answers: to them.
        detected: the languages of the answers, from `detect_answers`.
    """
    n = len(answers)
    passed = sum(language == asked for language in detected)
    rate = passed / n
    return Fidelity(
        n=n,
        passed=passed,
        rate=rate,
        standard_error=(rate * (1 - rate) / n) ** 0.5,
        answered=dict(sorted(Counter(detected).items())),
        repeating=sum(map(is_repeating, answers)),
        echoing=sum(map(is_echo, prompts, answers)),
    )


def is_repeating(answer: str) -> bool:
    """Whether more than half of an answer's 4-grams have occurred before, or it ends in a loop.

    Note:
        It is meant for answers of some hundred words; characters of a long text repeat anyway.

    Example:
        >>> is_repeating("so it goes " * 8), is_repeating("Each word here is a new one, I hope.")
        (True, False)
        >>> is_repeating("The capital of France is the city of, the city of, the city of, the ci")
        True
    """
    words = answer.split()
    # Chinese, Japanese and Thai have few spaces: their characters are the units.
    has_words = len(words) > len(answer) / 12
    units: Sequence[str] = words if has_words else answer
    grams = [tuple(units[i : i + _GRAM]) for i in range(len(units) - _GRAM + 1)]
    if grams and 1 - len(set(grams)) / len(grams) > _REPEATING_RATIO:
        return True
    letters = ["".join(filter(str.isalnum, unit)).casefold() for unit in units]
    letters = [unit for unit in letters if unit]
    least = _LOOP_WORDS if has_words else _LOOP_CHARACTERS
    # The last word may have been cut off.
    return _ends_in_loop(letters, least) or _ends_in_loop(letters[:-1], least)


def _ends_in_loop(units: Sequence[str], least: int) -> bool:
    """Whether the last units, at least so many, are one unit or sequence three times in a row."""
    for period in range(1, len(units) // _LOOPS + 1):
        n_same = 0
        while n_same + period < len(units) and units[-1 - n_same] == units[-1 - n_same - period]:
            n_same += 1
        if n_same + period >= max(_LOOPS * period, least):
            return True
    return False


def is_echo(prompt: str, answer: str) -> bool:
    """Whether an answer begins by repeating its question.

    An echo is in the language of the question, and may answer nothing; what follows it is not
    judged. Only letters and digits are compared. Of an answer that is shorter than its question, or
    was cut off, the whole counts.

    Example:
        >>> is_echo("What are the three primary colours?", "What are the three primary colours? I")
        True
        >>> is_echo("What are the three primary colours?", "The three primary colours are red, …")
        False
    """
    asked, said = ("".join(filter(str.isalnum, text)).casefold() for text in (prompt, answer))
    n_same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, said, strict=False))
    )
    return n_same >= max(_ECHO_LETTERS, _ECHO_RATIO * min(len(asked), len(said)))
