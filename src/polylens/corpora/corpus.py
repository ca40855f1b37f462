"""The kinds of corpora: texts per language, parallel rows, prompts with answers.

All are immutable, checked when made, and know nothing of files; `polylens.corpora.readers` makes
them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from polylens.errors import CorpusError
from polylens.languages import normalize_language

T = TypeVar("T")


@dataclass(frozen=True)
class Corpus:
    """Texts per language, not parallel: for probing.

    Attributes:
        name: for reports.
        texts: BCP 47 code → texts, none of them blank.
    """

    name: str
    texts: Mapping[str, tuple[str, ...]]

    @classmethod
    def make(cls, name: str, texts: Mapping[str, Iterable[str]]) -> Corpus:
        """Build a corpus; codes are normalised, surrounding white space goes, blank texts too.

        Raises:
            LanguageError: a language is unknown.
            CorpusError: no text is left.
        """
        cleaned: dict[str, tuple[str, ...]] = {}
        for code, given in texts.items():
            kept = tuple(text.strip() for text in given if text and text.strip())
            if kept:
                language = normalize_language(code)
                cleaned[language] = cleaned.get(language, ()) + kept
        if not cleaned:
            raise CorpusError(
                f"a corpus must hold at least one text, but {name} holds none; check it"
            )
        return cls(name, cleaned)

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages with at least one text."""
        return tuple(self.texts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the texts."""
        return _sha256(self.texts)

    def select(self, languages: Sequence[str], n_texts: int | None = None, seed: int = 0) -> Corpus:
        """Keep some languages, and at most `n_texts` texts of each, chosen by `seed`.

        Raises:
            CorpusError: a language has no text.
        """
        require_languages(self, languages)
        return Corpus(
            self.name, {k: tuple(sample(self.texts[k], n_texts, seed)) for k in languages}
        )


@dataclass(frozen=True)
class ParallelCorpus:
    """Rows that say the same in several languages: for training and evaluation.

    Attributes:
        name: for reports.
        rows: each maps BCP 47 codes to texts; a language may be missing in some rows.
        n_heldout: the last so many rows are kept apart for evaluation by the corpus itself.
        answers: BCP 47 code → text → its answer, where the corpus has one.
    """

    name: str
    rows: tuple[Mapping[str, str], ...]
    n_heldout: int = 0
    answers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def make(
        cls, name: str, rows: Iterable[Mapping[str, str | None]], n_heldout: int = 0
    ) -> ParallelCorpus:
        """Build a parallel corpus; codes are normalised, texts stripped, blank ones dropped.

        Raises:
            LanguageError: a language is unknown.
            CorpusError: no row is left.
        """
        codes: dict[str, str] = {}
        cleaned = []
        for row in rows:
            kept = {}
            for code, text in row.items():
                if text and text.strip():
                    codes.setdefault(code, normalize_language(code))
                    kept[codes[code]] = text.strip()
            if kept:
                cleaned.append(kept)
        if not cleaned:
            raise CorpusError(
                f"a corpus must hold at least one row, but {name} holds none; check it"
            )
        return cls(name, tuple(cleaned), n_heldout)

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages with at least one text, in the order of their first appearance."""
        return tuple(dict.fromkeys(language for row in self.rows for language in row))

    @property
    def n_missing(self) -> dict[str, int]:
        """For each language, the rows that lack it."""
        return {k: sum(k not in row for row in self.rows) for k in self.languages}

    @property
    def n_answers(self) -> dict[str, int]:
        """For each language, the rows that have an answer in it."""
        return {
            k: sum(k in row and self.answer(k, row[k]) is not None for row in self.rows)
            for k in self.languages
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rows, and of their answers where there are any."""
        answers = [{k: self.answer(k, text) for k, text in row.items()} for row in self.rows]
        has_some = any(answer for row in answers for answer in row.values())
        return _sha256([self.rows, answers] if has_some else self.rows)

    def answer(self, language: str, text: str) -> str | None:
        """Return the answer to a text, or None."""
        return self.answers.get(language, {}).get(text)

    def select(self, languages: Sequence[str]) -> ParallelCorpus:
        """Keep the texts of some languages, and the rows with the first one and at least one other.

        Args:
            languages: central language first, then the targets.

        Raises:
            CorpusError: a language is missing everywhere, or a target shares no row with the
                centre.
        """
        require_languages(self, languages)
        central, *targets = languages
        for target in targets:
            if not any(central in row and target in row for row in self.rows):
                raise CorpusError(
                    f"rows of {self.name} must be parallel, but none holds both {central} and "
                    f"{target}; put translations of one text into one row"
                )
        first_heldout = len(self.rows) - self.n_heldout
        rows, n_heldout = [], 0
        for index, row in enumerate(self.rows):
            kept = {language: row[language] for language in languages if language in row}
            if central in kept and len(kept) > 1:
                rows.append(kept)
                n_heldout += index >= first_heldout
        return dataclasses.replace(self, rows=tuple(rows), n_heldout=n_heldout)

    def split(self, n_heldout: int, seed: int = 0) -> tuple[ParallelCorpus, ParallelCorpus]:
        """Set rows apart for evaluation.

        A corpus with held-out rows of its own gives those, at most `n_heldout` of them; from any
        other corpus rows are drawn by `seed`.

        Returns:
            The rows to train on, and those held out.

        Raises:
            CorpusError: no row would be left to train on.
        """
        if self.n_heldout:
            cut = len(self.rows) - self.n_heldout
            train, heldout = self.rows[:cut], self.rows[cut : cut + n_heldout]
        else:
            if len(self.rows) <= n_heldout:
                raise CorpusError(
                    f"a parallel corpus must hold more rows than are held out, but {self.name} "
                    f"holds {len(self.rows)} and evaluate.rows is {n_heldout}; lower it or add rows"
                )
            order = list(range(len(self.rows)))
            random.Random(seed).shuffle(order)
            chosen = set(order[:n_heldout])
            train = tuple(row for i, row in enumerate(self.rows) if i not in chosen)
            heldout = tuple(row for i, row in enumerate(self.rows) if i in chosen)
        whole = dataclasses.replace(self, n_heldout=0)
        return dataclasses.replace(whole, rows=train), dataclasses.replace(whole, rows=heldout)

    def limit(self, n_rows: int | None, seed: int = 0) -> ParallelCorpus:
        """Keep at most `n_rows` rows, chosen by `seed`, in their order."""
        chosen = tuple(sample(self.rows, n_rows, seed))
        return dataclasses.replace(self, rows=chosen, n_heldout=0)

    def to_answered(self) -> AnsweredCorpus:
        """Return the texts that have an answer, with it."""
        pairs: dict[str, list[tuple[str, str]]] = {}
        for row in self.rows:
            for language, text in row.items():
                if answer := self.answer(language, text):
                    pairs.setdefault(language, []).append((text, answer))
        return AnsweredCorpus.make(self.name, pairs)

    def to_corpus(self) -> Corpus:
        """Return the texts of each language, no longer parallel."""
        return Corpus.make(
            self.name,
            {k: [row[k] for row in self.rows if k in row] for k in self.languages},
        )


@dataclass(frozen=True)
class AnsweredCorpus:
    """Prompts with their answers, per language: for supervised fine-tuning.

    Attributes:
        name: for reports.
        pairs: BCP 47 code → (prompt, answer), none of them blank.
    """

    name: str
    pairs: Mapping[str, tuple[tuple[str, str], ...]]

    @classmethod
    def make(cls, name: str, pairs: Mapping[str, Iterable[tuple[str, str]]]) -> AnsweredCorpus:
        """Build a corpus of normalised codes and stripped texts; pairs that lack one are left out.

        It may turn out empty.
        """
        kept = {
            language: tuple((prompt, answer) for prompt, answer in given if prompt and answer)
            for language, given in pairs.items()
        }
        return cls(name, {language: own for language, own in kept.items() if own})

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages with at least one pair."""
        return tuple(self.pairs)


def require_languages(
    corpus: Corpus | ParallelCorpus | AnsweredCorpus, languages: Sequence[str]
) -> None:
    """Check that a corpus has some text in each language.

    Raises:
        CorpusError: one is missing.
    """
    missing = [language for language in languages if language not in corpus.languages]
    if missing:
        raise CorpusError(
            f"{corpus.name} must hold texts in {', '.join(languages)}, but has none in "
            f"{', '.join(missing)}; it holds {', '.join(corpus.languages)}"
        )


def sample(items: Sequence[T], n_items: int | None, seed: int) -> list[T]:
    """Choose at most `n_items`, keeping their order; all of them keep it trivially."""
    if n_items is None or len(items) <= n_items:
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), n_items))
    return [items[index] for index in chosen]


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, default=list).encode()).hexdigest()
