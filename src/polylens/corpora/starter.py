"""The starter corpus: parallel instructions in ten languages, shipped with the package."""

from __future__ import annotations

import functools
import json
from importlib import resources

from polylens.corpora.corpus import ParallelCorpus

LANGUAGES = ("en", "zh", "ja", "ko", "ar", "bn", "sw", "es", "fr", "de")


@functools.cache
def starter_corpus() -> ParallelCorpus:
    """Return 128 instructions in ten languages; the last 32 are held out for evaluation.

    Example:
        >>> corpus = starter_corpus()
        >>> len(corpus.rows), corpus.n_heldout, corpus.languages[:3]
        (128, 32, ('en', 'zh', 'ja'))
    """
    text = resources.files("polylens.corpora").joinpath("starter.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    rows.sort(key=lambda row: row["split"] == "heldout")  # stable: train rows first
    n_heldout = sum(row["split"] == "heldout" for row in rows)
    return ParallelCorpus.make(
        "starter", [{k: row[k] for k in LANGUAGES if k in row} for row in rows], n_heldout
    )
