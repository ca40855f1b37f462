"""Corpora: texts per language, parallel rows, answered prompts, and where they come from."""

from polylens.corpora.corpus import AnsweredCorpus, Corpus, ParallelCorpus, require_languages
from polylens.corpora.readers import read_answered, read_parallel, read_texts
from polylens.corpora.starter import starter_corpus

__all__ = [
    "AnsweredCorpus",
    "Corpus",
    "ParallelCorpus",
    "read_answered",
    "read_parallel",
    "read_texts",
    "require_languages",
    "starter_corpus",
]
