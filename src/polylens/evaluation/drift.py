"""How far training moved a model's states and its next-token distribution, language by language.

`summarise_states` reduces what `run_crown` yields, once for the untouched model and once with the
delta applied; `measure_change` compares the two. Both sides come from the same batches, so a delta
of zero changes nothing, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from polylens.evaluation.likelihood import StateBatch
from polylens.hidden_states import pool
from polylens.models.structure import DecoderStructure

# Prompts whose logits are in memory at a time, before and after, in float64.
_ROWS = 64


@dataclass(frozen=True)
class PromptStates:
    """What is compared of each prompt.

    Attributes:
        structure: the model, whose head turns `last` into next-token probabilities when they are
            compared; no delta changes the head, and probabilities of all prompts would be large.
        mean: (n_prompts, hidden_size) float32, mean over tokens of the states after the final norm.
        last: (n_prompts, hidden_size) float32, state of the last token after the final norm.
    """

    structure: DecoderStructure
    mean: Tensor
    last: Tensor


@dataclass(frozen=True)
class StateChange:
    """How much the states of one language's prompts changed.

    Small is better for a language to protect; a target has to move.

    Attributes:
        relative: mean over prompts of ‖h - h°‖ / ‖h°‖, where h is the mean over tokens of the
            states after the final norm, and h° that of the untouched model. 0 is no change.
        standard_error: of `relative`; 0 for a single prompt.
        kl_bits: mean over prompts of the Kullback-Leibler divergence KL(before ‖ after) of the
            token that follows the prompt, in bits. 0 is no change.
        n: prompts.
    """

    relative: float
    standard_error: float
    kl_bits: float
    n: int


@torch.no_grad()
def summarise_states(
    structure: DecoderStructure, batches: Iterable[StateBatch], n_prompts: int
) -> PromptStates:
    """Reduce the last layer's states to what is compared.

    Args:
        structure: the model whose final norm is used.
        batches: indices of prompts, (batch, seq_len, hidden_size) output of the last layer before
            the final norm, padded on the right, and (batch,) lengths; as `run_crown` yields them.
        n_prompts: of all batches.
    """
    mean = torch.empty(n_prompts, structure.hidden_size)
    last = torch.empty(n_prompts, structure.hidden_size)
    for rows, output, lengths in batches:
        # In float32: a mean rounded to bfloat16 would hide small changes.
        normed = structure.final_norm(output).float()
        on_device = lengths.to(output.device)
        mean[list(rows)] = pool(normed, on_device, "mean").cpu()
        last[list(rows)] = pool(normed, on_device, "last").cpu()
    return PromptStates(structure, mean, last)


def measure_change(before: PromptStates, after: PromptStates, rows: Sequence[int]) -> StateChange:
    """Compare the states of some prompts before and after.

    Args:
        before: of the untouched model.
        after: of the enhanced model, same prompts.
        rows: prompts of one language, at least one.
    """
    index = list(rows)
    n = len(index)
    distance = (after.mean[index] - before.mean[index]).norm(dim=1)
    relative = distance.double() / before.mean[index].norm(dim=1).double()  # (n,)
    nats = 0.0
    for start in range(0, n, _ROWS):
        chunk = index[start : start + _ROWS]
        nats += float(
            functional.kl_div(
                _log_probabilities(after, chunk),
                _log_probabilities(before, chunk),
                reduction="sum",
                log_target=True,
            )
        )
    return StateChange(
        relative=float(relative.mean()),
        standard_error=float(relative.std() / n**0.5) if n > 1 else 0.0,
        kl_bits=max(0.0, nats / n / math.log(2)),  # rounding can make it a hair negative
        n=n,
    )


@torch.no_grad()
def _log_probabilities(states: PromptStates, rows: Sequence[int]) -> Tensor:
    """Log-probabilities of the token that follows each prompt: (n_rows, vocab_size) float64."""
    structure = states.structure
    last = states.last[list(rows)].to(structure.device, structure.dtype)
    logits = structure.logits(last[None])[0]
    return logits.float().cpu().double().log_softmax(-1)
