"""How many tokens a batch should have: measured on one layer of the model, on this machine.

Small batches leave the processor's matrix products short of rows; large ones fall out of its
caches. Where the best is differs by a factor of two in speed between machines and models.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from polylens.machine import device_name, keeping_freed_memory, remembered
from polylens.models.structure import Calls, DecoderStructure

_BUDGETS = (512, 1024, 2048, 4096)
_GPU_BUDGETS = (4096, 16384, 65536)

# The smallest batch within this share of the best rate is taken: it needs the least memory.
_GOOD_ENOUGH = 0.95

# Measuring may cost this share of the pass that it is for.
_COST_RATIO = 1 / 30

# Tokens whose activations are in memory at once, for the backward pass. A step of the published
# settings (8 rows in 7 languages) is about 4,000.
_MAX_GRAPH_TOKENS = 4096

# Rows of logits in memory at once, with their gradient: those of a whole step would be the largest
# thing in memory.
LOGIT_ROWS = 512

# Length of a prompt while measuring: that of the corpora at hand.
_SEQ_LEN = 64


def activation_bytes(structure: DecoderStructure) -> int:
    """Return about how many bytes one token's activations take in one decoder layer."""
    widest = sum(max(p.shape) for p in structure.layers[0].parameters() if p.ndim > 1)
    # Each matrix leaves its output, and what is between them is about as much again.
    return 2 * widest * structure.dtype.itemsize


def best_token_budget(
    structure: DecoderStructure, n_tokens: int, batch_bytes: int | None = None
) -> int:
    """Return the padded tokens that a batch of this model should have on this machine.

    Args:
        structure: the model.
        n_tokens: of the pass that it is for; for a short one nothing is measured.
        batch_bytes: that the activations of a batch should take at most.
    """
    budgets: tuple[int, ...] = _BUDGETS if structure.device.type == "cpu" else _GPU_BUDGETS
    if batch_bytes is not None:
        fitting = tuple(b for b in budgets if b * activation_bytes(structure) <= batch_bytes)
        budgets = fitting or budgets[:1]
    default = max((b for b in budgets if b <= 1024), default=budgets[0])
    measured_tokens = 3 * sum(budgets)
    if len(budgets) == 1 or n_tokens * structure.n_layers * _COST_RATIO < measured_tokens:
        return default

    def measure() -> int:
        rates = {budget: _layer_rate(structure, budget) for budget in budgets}
        best = max(rates.values())
        return min(b for b, rate in rates.items() if rate >= _GOOD_ENOUGH * best)

    shapes = sorted(tuple(p.shape) for p in structure.layers[0].parameters())
    what = f"token budget of {structure.dtype} {shapes} up to {budgets[-1]}"
    return int(remembered(f"{device_name(structure.device)} {what}", measure))


def best_graph_tokens(
    structure: DecoderStructure, n_layers: int, batch_bytes: int | None = None
) -> int:
    """Return the tokens whose activations are kept at once, for the backward pass.

    Args:
        structure: the model.
        n_layers: decoder layers that gradients flow through.
        batch_bytes: that activations should take at most.
    """
    if batch_bytes is None:
        return _MAX_GRAPH_TOKENS
    return min(_MAX_GRAPH_TOKENS, batch_bytes // (activation_bytes(structure) * n_layers))


def groups_within(rows: Sequence[int], n_tokens: Sequence[int], most: int) -> Iterator[list[int]]:
    """Cut rows into groups of at most so many tokens; a longer row makes a group of its own.

    Args:
        rows: in the order in which they are cut.
        n_tokens: of each row, by its number.
        most: tokens of a group.

    Example:
        >>> list(groups_within([2, 0, 1], n_tokens=[5, 9, 3], most=8))
        [[2, 0], [1]]
    """
    group: list[int] = []
    total = 0
    for row in rows:
        if group and total + n_tokens[row] > most:
            yield group
            group, total = [], 0
        group.append(row)
        total += n_tokens[row]
    if group:
        yield group


@torch.no_grad()
def _layer_rate(structure: DecoderStructure, n_tokens: int) -> float:
    """Tokens a second of one decoder layer, by the faster of two runs after one."""
    shape = (n_tokens // _SEQ_LEN, _SEQ_LEN)
    states = torch.ones(*shape, structure.hidden_size).to(structure.device, structure.dtype)
    call = Calls(structure).of_batch(*shape)[0]
    layer: nn.Module = structure.layers[0]

    def seconds() -> float:
        started = time.perf_counter()
        output: Tensor = call(layer, states)
        if output.device.type != "cpu":
            output[0, 0, 0].item()  # wait for it
        return time.perf_counter() - started

    with structure.loaded(0, 1), keeping_freed_memory():
        seconds()
        return n_tokens / min(seconds(), seconds())
