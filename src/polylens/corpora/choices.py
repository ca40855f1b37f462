"""Questions with two answers, of which one is to be picked by its letter.

They are the starter corpus's own, each with its own answer and the next row's. Those of the
held-out rows are measured (`polylens.evaluation.choices`), those of the training rows can be
retained: a model that is pushed to another language forgets how to pick a letter long before its
texts show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polylens.corpora.corpus import ParallelCorpus
from polylens.corpora.starter import starter_corpus

LETTERS = ("A", "B")


def heldout_choices(language: str) -> list[tuple[str, str]]:
    """Return each held-out question, with its own answer as A, and as B.

    None where the starter corpus lacks the language.

    Example:
        >>> as_a, as_b = heldout_choices("en")[0]
        >>> as_a.splitlines()[-1]
        'Reply with the letter alone, A or B.'
    """
    corpus = starter_corpus()
    return _two_answers(language, corpus.split(corpus.n_heldout)[1].rows)


def training_choices(
    language: str, trained: ParallelCorpus, apart: ParallelCorpus | None = None
) -> list[tuple[str, str]]:
    """Return each question of the training rows, with its own answer as A, and as B.

    None where the starter corpus lacks the language.

    Args:
        language: of the questions.
        trained: the rows that train. Where they are the starter corpus's, theirs are the only
            questions: the others' may be held out.
        apart: rows that are measured on; their questions are not among those returned.
    """
    corpus = starter_corpus()
    measured = {row.get(language) for row in apart.rows} if apart else set()
    rows = [
        row for row in corpus.split(corpus.n_heldout)[0].rows if row.get(language) not in measured
    ]
    seen = {row.get(language) for row in trained.rows}
    own = [row for row in rows if row.get(language) in seen]
    return _two_answers(language, own or rows)


def _two_answers(language: str, rows: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    corpus = starter_corpus()
    if language not in corpus.languages or len(rows) < 2:
        return []
    questions = [row[language] for row in rows]
    answers = [corpus.answers[language][question] for question in questions]
    return [
        (_ask(question, own, other), _ask(question, other, own))
        for question, own, other in zip(questions, answers, (*answers[1:], answers[0]), strict=True)
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
