"""How likely a text of a language is as the reply to a prompt of that language.

A cheap sign of what answers will be like, where writing them out would cost a hundred times as
much: the method acts on the state that the first token of a reply is read off, and a model that
turns to English there makes the language's own words unlikely. The texts are those of other rows,
so they answer nothing; only their first characters are scored, which is where the language of a
reply is decided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from polylens.evaluation.comparison import Heldout
from polylens.evaluation.measures import Example, Task, TaskRun
from polylens.evaluation.scoring import Candidate, score_continuations
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.scratch import Scratch
from polylens.states_cache import Collect, fresh_hidden_states

REPLIES = "replies"

# Characters of a reply; some ten tokens of a language that a model knows.
_N_CHARACTERS = 40


def measure_replies(
    model: LanguageModel,
    candidates: Sequence[Candidate],
    heldout: Heldout,
    *,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    collect: Collect = fresh_hidden_states,
    progress: Progress = silent,
) -> list[TaskRun]:
    """Bits per byte of each row's next text as the reply to its prompt; one run a language.

    Args:
        model: the untouched model.
        candidates: crowns of this model.
        heldout: prompts, and rows whose texts are the replies.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for the states; None takes memory without limit.
        collect: how hidden states are had.
        progress: told how far each piece of work is.
    """
    requests, owners = [], []  # owners: language, row, bytes of the reply
    prompts = heldout.prompts
    for language in heldout.all_languages:
        numbers = [number for number, row in enumerate(prompts.rows) if language in row]
        for number, following in zip(numbers, (*numbers[1:], *numbers[:1]), strict=True):
            source = heldout.corpus.rows[prompts.sources[following]][language]
            reply = source[:_N_CHARACTERS]
            ids = model.tokenizer(reply, add_special_tokens=False)["input_ids"]
            if ids:
                requests.append((prompts.ids[prompts.rows[number][language]], ids))
                owners.append((language, prompts.sources[number], len(reply.encode())))
    scores = score_continuations(
        model,
        requests,
        candidates,
        token_budget=token_budget,
        scratch=scratch,
        collect=collect,
        progress=progress,
    )
    return [
        TaskRun(
            Task(f"{REPLIES}_{language}", language, "text", "bits_per_byte", False),
            tuple(
                tuple(
                    Example(
                        key=str(row),
                        value=-score.log_likelihood / math.log(2) / n_bytes,
                        responses={"bytes": n_bytes},
                    )
                    for score, (own, row, n_bytes) in zip(of_candidate, owners, strict=True)
                    if own == language
                )
                for of_candidate in scores
            ),
        )
        for language in heldout.all_languages
    ]
