"""Whether a model still tells which of two answers belongs to a question, by the letter it replies.

Texts, and answers like those that were learnt, can get likelier while a model forgets how to pick a
letter after a chat prompt: bits per byte see nothing of it. Here nobody has to bring a benchmark to
see it: the questions are the starter corpus's held-out rows, which nothing trains on, each with its
own answer and the next row's, asked in both orders. `polylens.evaluation.letters` makes a share of
right letters of the log odds: a new habit of saying A, or B, harms it as it harms benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polylens.corpora.choices import LETTERS, heldout_choices
from polylens.evaluation.letters import right_shares
from polylens.evaluation.measures import Example, Task, TaskRun
from polylens.evaluation.scoring import Candidate, score_continuations
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.prompts import PromptFormat
from polylens.scratch import Scratch
from polylens.states_cache import Collect, fresh_hidden_states

CHOICES = "choices"

_MAX_TOKENS = 16  # of a letter


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
    a, b = (prompt_format.encode_beginning(tokenizer, one, _MAX_TOKENS) for one in LETTERS)
    choices = []
    for row, texts in enumerate(heldout_choices(language)):
        if whole := prompt_format.encode_whole(tokenizer, texts):
            as_a, as_b = whole
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
    """The share of right letters that is to be expected; 0.5 is guessing.

    A candidate's own habit has no part in it here; what it adds to another's counts where the two
    are compared.

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
        # A and B, where A is right; A and B, where B is.
        odds = [
            (found[place] - found[place + 1], found[place + 3] - found[place + 2])
            for place in range(0, len(found), 4)
        ]
        examples.append(
            tuple(
                Example(str(one.row), share, log_odds=own)
                for one, own, share in zip(choices, odds, right_shares(odds), strict=True)
            )
        )
    task = Task(f"{CHOICES}_{language}", language, "choice", "right_letters")
    return TaskRun(task, tuple(examples))
