"""How far training moved a model's states and its next-token distribution, language by language."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polylens.evaluation.likelihood import StateBatch
from polylens.hidden_states import pool
from polylens.models.structure import DecoderStructure


@dataclass(frozen=True)
class PromptStates:
    """What is compared of each prompt.

    Attributes:
        mean: (n_prompts, hidden_size) float32, mean over tokens of the states after the final norm.
        last: (n_prompts, hidden_size) float32, state of the last token after the final norm.
        log_probabilities: (n_prompts, vocab_size) float32, of the token after the prompt.
    """

    mean: Tensor
    last: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True)
class StateChange:
    """How much the states of one language's prompts changed. Lower is better for a language to protect.

    Attributes:
        relative: mean over prompts of ‖h - h°‖ / ‖h°‖, h the mean over tokens after the final norm.
        standard_error: of `relative`.
        kl_bits: mean Kullback-Leibler divergence of the next-token distribution after training from
            that before, in bits.
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
        structure: the model whose final norm and head are used.
        batches: as `run_crown` yields them.
        n_prompts: of all batches.
    """
    mean = torch.empty(n_prompts, structure.hidden_size)
    last = torch.empty(n_prompts, structure.hidden_size)
    log_probabilities: Tensor | None = None
    for rows, output, lengths in batches:
        normed = structure.final_norm(output)
        lengths = lengths.to(output.device)
        mean[list(rows)] = pool(normed, lengths, "mean").float().cpu()
        final = pool(normed, lengths, "last")
        last[list(rows)] = final.float().cpu()
        logits = structure.logits(final[:, None])[:, 0].float().cpu()
        if log_probabilities is None:
            log_probabilities = torch.empty(n_prompts, logits.shape[-1])
        log_probabilities[list(rows)] = logits.log_softmax(-1)
    assert log_probabilities is not None
    return PromptStates(mean, last, log_probabilities)


def measure_change(before: PromptStates, after: PromptStates, rows: Sequence[int]) -> StateChange:
    """Compare the states of some prompts before and after.

    Args:
        before: of the untouched model.
        after: of the enhanced model, same prompts.
        rows: prompts of one language, at least one.
    """
    index = list(rows)
    difference = (after.mean[index] - before.mean[index]).norm(dim=1)
    relative = (difference / before.mean[index].norm(dim=1)).double()
    was, now = before.log_probabilities[index].double(), after.log_probabilities[index].double()
    kl = (was.exp() * (was - now)).sum(1) / math.log(2)
    n = len(index)
    return StateChange(
        relative=float(relative.mean()),
        standard_error=float(relative.std() / n**0.5) if n > 1 else 0.0,
        kl_bits=float(kl.mean().clamp(min=0)),
        n=n,
    )
