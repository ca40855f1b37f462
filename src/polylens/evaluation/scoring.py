"""Log-likelihoods of continuations, by a model and any number of its crowns, from one trunk pass.

Nearly every multiple-choice benchmark asks how likely each answer is after its question. The trunk
runs each question with each answer once; then every crown, the untouched one first, runs from the
states that enter it. So a further candidate costs its layers and the head, not a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polylens.crown import Change, run_crown
from polylens.evaluation.likelihood import Target, score_tokens
from polylens.hidden_states import Keep
from polylens.machine import keeping_freed_memory
from polylens.models.loading import LanguageModel
from polylens.models.structure import DecoderStructure
from polylens.progress import Progress, silent
from polylens.scratch import Scratch
from polylens.states_cache import Collect, fresh_hidden_states
from polylens.token_budget import best_token_budget


@dataclass(frozen=True)
class Candidate:
    """A crown to score: the model's own, or what training or steering makes of it.

    Attributes:
        delta: what training changed, or a steering; None is the untouched model.
        strength: the dial.
        dtype: round the changed weights to it first, as a model saved in it would be.
    """

    delta: Change | None = None
    strength: float = 1.0
    dtype: torch.dtype | None = None

    def applied(self, structure: DecoderStructure) -> contextlib.AbstractContextManager[None]:
        """Give the model this crown for a while."""
        if self.delta is None:
            return contextlib.nullcontext()
        return self.delta.applied(structure, self.strength, self.dtype)


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
        log_likelihood: sum over its tokens of log p(token | what stands before), in nats.
        is_greedy: greedy decoding would give exactly this continuation.
    """

    log_likelihood: float
    is_greedy: bool


def score_continuations(
    model: LanguageModel,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    candidates: Sequence[Candidate] = (Candidate(),),
    *,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    collect: Collect = fresh_hidden_states,
    progress: Progress = silent,
) -> list[list[Score]]:
    """Score continuations of contexts with each of some crowns.

    Args:
        model: the untouched model.
        requests: token ids of a context and of its continuation, at least one each.
        candidates: crowns of this model.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for the states; None takes memory without limit.
        collect: how hidden states are had; with a `KeptStates` further candidates cost no trunk.
        progress: told the tokens done, then the candidates.

    Returns:
        For each candidate, the scores in the order of the requests.
    """
    structure = model.structure
    scratch = scratch or Scratch()
    # The last token of a continuation is predicted, never read; so choices of one token, as the
    # letters of an answer, have one text in common, and it is run once.
    texts: dict[tuple[int, ...], int] = {}
    numbers = [texts.setdefault((*given, *wanted[:-1]), len(texts)) for given, wanted in requests]
    n_last = [0] * len(texts)
    for text, (_, wanted) in zip(numbers, requests, strict=True):
        n_last[text] = max(n_last[text], len(wanted))
    targets = [
        Target(text, n_last[text] - len(wanted), wanted)
        for text, (_, wanted) in zip(numbers, requests, strict=True)
    ]
    token_budget = token_budget or best_token_budget(
        structure, sum(map(len, texts)), scratch.batch_bytes
    )
    firsts = _first_layers(candidates, structure)
    states = collect(
        model,
        list(texts),
        Keep(boundary_layers=tuple(sorted(set(firsts)))),
        token_budget=token_budget,
        scratch=scratch,
        progress=progress,
    )
    found = []
    with keeping_freed_memory(), structure.loaded_head():
        for number, (candidate, first) in enumerate(zip(candidates, firsts, strict=True)):
            progress(number, len(candidates), "candidates")
            with candidate.applied(structure):
                batches = run_crown(
                    structure,
                    states,
                    token_budget=token_budget,
                    boundary_layer=first,
                    n_last=n_last,
                )
                scores = zip(*score_tokens(structure, batches, targets), strict=True)
                found.append([Score(*score) for score in scores])
    progress(len(candidates), len(candidates), "candidates")
    return found


def _first_layers(candidates: Sequence[Candidate], structure: DecoderStructure) -> list[int]:
    """Where each crown begins.

    The untouched one begins with the last of the others, so that a delta of zero gives the same to
    the bit; alone, all of it is trunk.
    """
    changed = [min(one.delta.layers) for one in candidates if one.delta is not None]
    untouched = max(changed, default=structure.n_layers)
    return [untouched if one.delta is None else min(one.delta.layers) for one in candidates]
