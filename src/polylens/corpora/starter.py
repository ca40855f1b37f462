"""The starter corpus: parallel instructions with answers in ten languages, part of the package."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources

from polylens.corpora.corpus import ParallelCorpus

LANGUAGES = ("en", "zh", "ja", "ko", "ar", "bn", "sw", "es", "fr", "de")


@functools.cache
def starter_corpus() -> ParallelCorpus:
    """Return 128 instructions with answers in ten languages; the last 32 are held out.

    Example:
        >>> corpus = starter_corpus()
        >>> len(corpus.rows), corpus.n_heldout, corpus.languages[:3]
        (128, 32, ('en', 'zh', 'ja'))
        >>> corpus.answer("de", corpus.rows[15]["de"])[:41]
        'Von 9 bis 12 Uhr spielen zwei Vierergrupp'
    """
    text = resources.files("polylens.corpora").joinpath("starter.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    rows.sort(key=lambda row: row["split"] == "heldout")  # stable: train rows first
    n_heldout = sum(row["split"] == "heldout" for row in rows)
    corpus = ParallelCorpus.make(
        "starter", [{k: row[k] for k in LANGUAGES} for row in rows], n_heldout
    )
    answers = {k: {row[k]: row[f"answer_{k}"] for row in rows} for k in LANGUAGES}
    return dataclasses.replace(corpus, answers=answers)
