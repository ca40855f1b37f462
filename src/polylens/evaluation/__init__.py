"""Evaluation: answers, language fidelity, bits per byte, drift, before and after."""

from polylens.evaluation.comparison import (
    Comparison,
    Heldout,
    answer,
    compare,
    evaluate,
    summarise,
)
from polylens.evaluation.results import Answer, Evaluation, read_answers, write_answers

__all__ = [
    "Answer",
    "Comparison",
    "Evaluation",
    "Heldout",
    "answer",
    "compare",
    "evaluate",
    "read_answers",
    "summarise",
    "write_answers",
]
