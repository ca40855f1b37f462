"""Whether a model still tells which of two answers belongs to a question, by the letter it replies.

Texts, and answers like those that were learnt, can get likelier while a model forgets how to pick a
letter after a chat prompt: bits per byte see nothing of it. Here nobody has to bring a benchmark to
see it: the questions are the starter corpus's held-out rows, which nothing trains on, each with its
own answer and the next row's. It is asked in both orders, and the log odds of the right letter
are averaged over the two, so that a habit of saying A, or B, has no part in the figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polylens.corpora.starter import starter_corpus
from polylens.evaluation.measures import Example, Task, TaskRun
from polylens.evaluation.scoring import Candidate, score_continuations
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.prompts import PromptFormat
from polylens.scratch import Scratch
from polylens.states_cache import Collect, fresh_hidden_states

CHOICES = "choices"

_LETTERS = ("A", "B")

# Longest question, where the tokenizer sets no limit of its own.
_MAX_TOKENS = 4096


@dataclass(frozen=True)
class Choice:
    """One question with two answers, in both orders.

    Attributes:
        row: of the starter corpus's held-out rows.
        prompts: token ids with the right answer as A, then as B.
        letters: token ids of A and of B as the beginning of an answer.
    """

    row: int
    prompts: tuple[tuple[int, ...], tuple[int, ...]]
    letters: tuple[tuple[int, ...], tuple[int, ...]]


def encode_choices(
    language: str, prompt_format: PromptFormat, tokenizer: Any
) -> tuple[Choice, ...]:
    """Tokenise the starter corpus's held-out questions of a language; none where it lacks it.

    Questions that the tokenizer's longest input does not hold are left out.
    """
    corpus = starter_corpus()
    if language not in corpus.languages:
        return ()
    longest = min(_MAX_TOKENS, tokenizer.model_max_length)
    a, b = (prompt_format.encode_beginning(tokenizer, one, _MAX_TOKENS) for one in _LETTERS)
    questions = [row[language] for row in corpus.split(corpus.n_heldout)[1].rows]
    answers = [corpus.answers[language][question] for question in questions]
    choices = []
    for row, (question, right, wrong) in enumerate(
        zip(questions, answers, (*answers[1:], *answers[:1]), strict=True)
    ):
        texts = [
            f"{question}\n\nWhich of these answers that?\nA. {first}\nB. {second}\n"
            "Reply with the letter alone, A or B."
            for first, second in ((right, wrong), (wrong, right))
        ]
        prompts = prompt_format.encode(tokenizer, texts, longest)
        if prompts.n_truncated == 0:
            as_a, as_b = prompts.ids
            choices.append(Choice(row, (as_a, as_b), (a, b)))
    return tuple(choices)


def measure_choices(
    model: LanguageModel,
    candidates: Sequence[Candidate],
    language: str,
    choices: Sequence[Choice],
    *,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    collect: Collect = fresh_hidden_states,
    progress: Progress = silent,
) -> TaskRun:
    """Bits of picking the right letter: 1 is guessing, 0 certainty.

    -log2(1 / (1 + exp(-x))), x being the log odds of the right letter against the wrong one,
    averaged over the two orders.

    Args:
        model: the untouched model.
        candidates: crowns of this model.
        language: of the questions.
        choices: from `encode_choices`, at least one.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for the states; None takes memory without limit.
        collect: how hidden states are had.
        progress: told how far each piece of work is.

    Returns:
        One example a question, by every candidate.
    """
    scores = score_continuations(
        model,
        [(prompt, letter) for one in choices for prompt in one.prompts for letter in one.letters],
        candidates,
        token_budget=token_budget,
        scratch=scratch,
        collect=collect,
        progress=progress,
    )
    examples = []
    for of_candidate in scores:
        found = [score.log_likelihood for score in of_candidate]
        examples.append(
            tuple(
                _example(one, found[4 * number : 4 * number + 4])
                for number, one in enumerate(choices)
            )
        )
    return TaskRun(
        Task(f"{CHOICES}_{language}", language, "choice", "bits", False), tuple(examples)
    )


def _example(choice: Choice, log_likelihoods: Sequence[float]) -> Example:
    """One question's figure, from the log-likelihoods of A and B where A is right, then B."""
    a_right, b_wrong, a_wrong, b_right = log_likelihoods
    log_odds = (a_right - b_wrong + b_right - a_wrong) / 2
    # log(1 + exp(-x)), without overflow.
    nats = max(-log_odds, 0.0) + math.log1p(math.exp(-abs(log_odds)))
    return Example(
        key=str(choice.row),
        value=nats / math.log(2),
        responses={"log_likelihoods": list(log_likelihoods)},
    )
