"""Corpora: texts per language, parallel rows, and where they come from."""

from polylens.corpora.corpus import Corpus, ParallelCorpus, require_languages
from polylens.corpora.readers import read_parallel, read_texts
from polylens.corpora.starter import starter_corpus

__all__ = [
    "Corpus",
    "ParallelCorpus",
    "read_parallel",
    "read_texts",
    "require_languages",
    "starter_corpus",
]
