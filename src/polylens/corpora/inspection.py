"""What is in a corpus, and what is wrong with it: counts, lengths, duplicates, foreign rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polylens.corpora.corpus import Corpus, ParallelCorpus
from polylens.detection import LanguageDetector, supported_languages
from polylens.languages import primary_subtag
from polylens.prompts import PromptFormat

# A warning is given from this share of a language's rows on.
_DOUBTFUL_RATIO = 0.02
_ROWS_NAMED = 5


@dataclass(frozen=True)
class LanguageReport:
    """What a corpus holds in one language.

    Attributes:
        language: BCP 47 code.
        n_texts: texts.
        n_missing: parallel rows that lack the language.
        n_duplicates: texts that have occurred before.
        n_untranslated: parallel rows whose text equals the central language's.
        foreign: rows that the detector takes for another language, as (row, language).
        n_tokens: tokens of all texts, without template; None without a tokenizer.
        tokens_per_word: tokens over words; for Chinese, Japanese and Thai over characters.
        token_premium: tokens over those of the same rows in the central language; None where the
            corpus is not parallel.
        n_truncated: prompts longer than the limit, template included.
    """

    language: str
    n_texts: int
    n_missing: int
    n_duplicates: int
    n_untranslated: int
    foreign: tuple[tuple[int, str], ...]
    n_tokens: int | None
    tokens_per_word: float | None
    token_premium: float | None
    n_truncated: int | None


@dataclass(frozen=True)
class CorpusReport:
    """What `polylens data` prints.

    Attributes:
        name: of the corpus.
        parallel: whether it has rows.
        n_rows: parallel rows; texts of all languages otherwise.
        languages: one report a language, central language first.
        warnings: what is doubtful, in sentences.
    """

    name: str
    parallel: bool
    n_rows: int
    languages: tuple[LanguageReport, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def inspect_corpus(
    corpus: Corpus | ParallelCorpus,
    *,
    central: str = "en",
    tokenizer: Any = None,
    prompt_format: PromptFormat | None = None,
    max_tokens: int = 128,
) -> CorpusReport:
    """Look for what makes a corpus less useful than it seems.

    Args:
        corpus: of either kind.
        central: the language that others are compared with.
        tokenizer: of the model in question; None leaves tokens out.
        prompt_format: for truncation; None takes texts as they are.
        max_tokens: the limit that truncation is counted against.
    """
    columns = _columns(corpus)
    names = sorted(columns, key=lambda language: language != central)  # central first, order kept
    known = [k for k in names if primary_subtag(k) in supported_languages()]
    detector = LanguageDetector(known)
    counts = (
        {k: [_n_tokens(tokenizer, text) for text in columns[k]] for k in names} if tokenizer else {}
    )
    reports = []
    for language in names:
        texts = columns[language]
        present = [(row, text) for row, text in enumerate(texts) if text is not None]
        own = [text for _, text in present]
        base = columns.get(central, [])
        same = 0
        if isinstance(corpus, ParallelCorpus) and base and language != central:
            same = sum(base[row] == text for row, text in present)
        foreign = []
        if language in known:
            for row, text in present:
                found = detector.detect(text)
                if found is not None and found != language:
                    foreign.append((row, found))
        n_tokens = sum(n for n in counts[language] if n) if tokenizer else None
        reports.append(
            LanguageReport(
                language=language,
                n_texts=len(own),
                n_missing=len(texts) - len(own),
                n_duplicates=len(own) - len(set(own)),
                n_untranslated=same,
                foreign=tuple(foreign),
                n_tokens=n_tokens,
                tokens_per_word=n_tokens / max(1, _n_words(own)) if n_tokens is not None else None,
                token_premium=_premium(corpus, counts, language, central),
                n_truncated=_n_truncated(tokenizer, prompt_format, own, max_tokens),
            )
        )
    return CorpusReport(
        name=corpus.name,
        parallel=isinstance(corpus, ParallelCorpus),
        n_rows=len(corpus.rows)
        if isinstance(corpus, ParallelCorpus)
        else sum(r.n_texts for r in reports),
        languages=tuple(reports),
        warnings=tuple(_warnings(reports, max_tokens)),
    )


def _columns(corpus: Corpus | ParallelCorpus) -> dict[str, list[str | None]]:
    if isinstance(corpus, ParallelCorpus):
        return {k: [row.get(k) for row in corpus.rows] for k in corpus.languages}
    return {k: list(texts) for k, texts in corpus.texts.items()}


def _n_tokens(tokenizer: Any, text: str | None) -> int | None:
    return None if text is None else len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _n_words(texts: Sequence[str]) -> int:
    """Words, or characters where a text has fewer than one space in twelve characters."""
    total = 0
    for text in texts:
        words = text.split()
        total += len(words) if len(words) * 12 > len(text) else sum(c.isalnum() for c in text)
    return total


def _premium(
    corpus: Corpus | ParallelCorpus,
    counts: dict[str, list[int | None]],
    language: str,
    central: str,
) -> float | None:
    if not counts or not isinstance(corpus, ParallelCorpus) or central not in counts:
        return None
    pairs = [(a, b) for a, b in zip(counts[language], counts[central], strict=True) if a and b]
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None


def _n_truncated(
    tokenizer: Any, prompt_format: PromptFormat | None, texts: Sequence[str], max_tokens: int
) -> int | None:
    if tokenizer is None:
        return None
    prompt_format = prompt_format or PromptFormat(None, "plain")
    return prompt_format.encode(tokenizer, texts, max_tokens).n_truncated


def _warnings(reports: Sequence[LanguageReport], max_tokens: int) -> list[str]:
    found = []
    for report in reports:
        doubtful = max(1, _DOUBTFUL_RATIO * report.n_texts)
        for count, what in (
            (report.n_duplicates, "have occurred before"),
            (report.n_untranslated, "equal the central language's text"),
        ):
            if count >= doubtful:
                found.append(f"{report.language}: {count} of {report.n_texts} texts {what}")
        if len(report.foreign) >= doubtful:
            rows = ", ".join(
                f"{row} ({language})" for row, language in report.foreign[:_ROWS_NAMED]
            )
            more = ", …" if len(report.foreign) > _ROWS_NAMED else ""
            found.append(
                f"{report.language}: {len(report.foreign)} of {report.n_texts} texts look like "
                f"another language: rows {rows}{more}"
            )
        if report.n_truncated:
            found.append(
                f"{report.language}: {report.n_truncated} of {report.n_texts} prompts are longer "
                f"than {max_tokens} tokens and would lose their end"
            )
    return found
