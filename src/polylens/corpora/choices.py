"""Questions with two answers, of which one is to be picked by its letter.

They are the starter corpus's own, each with its own answer and the next row's. Those of the
held-out rows are measured (`polylens.evaluation.choices`), those of the training rows can be
retained: a model that is pushed to another language forgets how to pick a letter long before its
texts show it.
"""

from __future__ import annotations

from typing import Literal

from polylens.corpora.starter import starter_corpus

LETTERS = ("A", "B")


def two_answers(language: str, part: Literal["training", "heldout"]) -> list[tuple[str, str]]:
    """Return each row's question, with its own answer as A, and as B.

    None where the starter corpus lacks the language.

    Example:
        >>> as_a, as_b = two_answers("en", "heldout")[0]
        >>> as_a.splitlines()[-1]
        'Reply with the letter alone, A or B.'
    """
    corpus = starter_corpus()
    if language not in corpus.languages:
        return []
    rows = corpus.split(corpus.n_heldout)[part == "heldout"].rows
    questions = [row[language] for row in rows]
    answers = [corpus.answers[language][question] for question in questions]
    return [
        (_ask(question, own, other), _ask(question, other, own))
        for question, own, other in zip(
            questions, answers, (*answers[1:], *answers[:1]), strict=True
        )
    ]


def _ask(question: str, *answers: str) -> str:
    lines = [f"{letter}. {answer}" for letter, answer in zip(LETTERS, answers, strict=True)]
    return "\n".join(
        [
            f"{question}\n",
            "Which of these answers that?",
            *lines,
            f"Reply with the letter alone, {' or '.join(LETTERS)}.",
        ]
    )
