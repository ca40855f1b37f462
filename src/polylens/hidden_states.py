"""The trunk pass: every prompt through the model once, keeping the states that are read later.

The crown (layers `boundary_layer` and up) is trained, evaluated and compared from the states that
enter it, and the subspaces are read off one pooled state per layer; so one pass per corpus serves
everything, and the reference states of the untouched model come from it too. No logits, no
attention masks (right padding and causal attention: pads never reach real tokens), batches sorted
by length and cut by a token budget.

Floor: 2 · parameters of the layers run · real tokens floating-point operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polylens.models.structure import DecoderStructure
from polylens.progress import Progress, silent

Pooling = Literal["last", "mean"]

# Matrix products stop growing faster at about 1,000 rows on the CPUs measured
# (docs/performance.md), while the activations of a batch grow with it.
TOKEN_BUDGET = 1024


@dataclass(frozen=True)
class Keep:
    """What a trunk pass keeps.

    Attributes:
        pooling: keep one state per prompt and layer: that of the "last" real token, or the "mean"
            over real tokens.
        boundary_layer: keep every real token's input of this layer.
        final: keep every real token's output of the last layer, before the final norm.
    """

    pooling: Pooling | None = None
    boundary_layer: int | None = None
    final: bool = False


@dataclass(frozen=True)
class HiddenStates:
    """What a trunk pass kept, in the order of the prompts. Tokens of all prompts lie end to end.

    Attributes:
        lengths: (n_prompts,) int64, tokens of each prompt.
        boundary_layer: the layer that `boundary` enters; None when it was not kept.
        pooled: (n_prompts, n_layers + 1, hidden_size) float32, one state a prompt and layer; the
            last entry has passed the final norm.
        boundary: (n_tokens, hidden_size), what enters `boundary_layer`.
        final: (n_tokens, hidden_size), the last layer's output before the final norm.
    """

    lengths: Tensor
    boundary_layer: int | None = None
    pooled: Tensor | None = None
    boundary: Tensor | None = None
    final: Tensor | None = None

    @property
    def offsets(self) -> list[int]:
        """Where each prompt's tokens begin; one more entry for the end."""
        return [0, *torch.cumsum(self.lengths, 0).tolist()]


def token_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Cut prompts into batches of similar length, each of at most `token_budget` padded tokens.

    Args:
        lengths: tokens of each prompt.
        token_budget: rows times longest length of a batch; a longer prompt makes a batch of its
            own.

    Yields:
        Indices of the prompts of one batch, longest first.

    Example:
        >>> list(token_batches([3, 9, 4, 8], token_budget=16))
        [[1], [3, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def pad_right(prompts: Sequence[Sequence[int]]) -> Tensor:
    """Stack prompts into (batch, longest) int64, padded on the right with id 0 (any id does)."""
    padded = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    for row, ids in enumerate(prompts):
        padded[row, : len(ids)] = torch.tensor(ids)
    return padded


def pool(hidden_states: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
    """Reduce each prompt's states to one.

    Args:
        hidden_states: (batch, seq_len, hidden_size), padded on the right.
        lengths: (batch,) int64, real tokens of each prompt.
        pooling: "last" real token, or "mean" over real tokens.

    Returns:
        (batch, hidden_size).
    """
    if pooling == "last":
        return hidden_states[torch.arange(len(lengths), device=lengths.device), lengths - 1]
    real = torch.arange(hidden_states.shape[1], device=lengths.device) < lengths[:, None]
    total = torch.where(real[..., None], hidden_states, 0).sum(1)
    return total / lengths[:, None].to(total.dtype)


@torch.no_grad()
def collect_hidden_states(
    structure: DecoderStructure,
    prompts: Sequence[Sequence[int]],
    keep: Keep,
    *,
    token_budget: int = TOKEN_BUDGET,
    progress: Progress = silent,
) -> HiddenStates:
    """Run every prompt through the model once and keep what `keep` asks for.

    Args:
        structure: the model.
        prompts: token ids, at least one each.
        keep: what to keep.
        token_budget: padded tokens of a batch.
        progress: told the tokens done.

    Returns:
        The states, on the CPU, in the order of the prompts.
    """
    lengths = torch.tensor([len(ids) for ids in prompts], dtype=torch.int64)
    n_layers, hidden_size, dtype = structure.n_layers, structure.hidden_size, structure.dtype
    n_tokens = int(lengths.sum())
    states = HiddenStates(
        lengths=lengths,
        boundary_layer=keep.boundary_layer,
        pooled=torch.empty(len(prompts), n_layers + 1, hidden_size) if keep.pooling else None,
        boundary=_tokens(n_tokens, hidden_size, dtype, keep.boundary_layer is not None),
        final=_tokens(n_tokens, hidden_size, dtype, keep.final),
    )
    offsets = states.offsets
    # Without states of the last layers, nothing above the boundary need run.
    n_run = n_layers if keep.pooling or keep.final else keep.boundary_layer or 0
    done = 0
    progress(0, n_tokens, "hidden states")
    for batch in token_batches(lengths.tolist(), token_budget):
        inputs = structure.layer_inputs(pad_right([prompts[i] for i in batch]).to(structure.device))
        rows = lengths[batch].to(structure.device)
        hidden_states = inputs.hidden_states  # (batch, seq_len, hidden_size)
        for index in range(n_run):
            if states.boundary is not None and index == keep.boundary_layer:
                _scatter(states.boundary, hidden_states, batch, offsets)
            hidden_states = inputs.calls[index](structure.layers[index], hidden_states)
            if states.pooled is not None and keep.pooling:
                states.pooled[batch, index] = pool(hidden_states, rows, keep.pooling).float().cpu()
        if states.boundary is not None and keep.boundary_layer == n_run:
            _scatter(states.boundary, hidden_states, batch, offsets)
        if states.final is not None:
            _scatter(states.final, hidden_states, batch, offsets)
        if states.pooled is not None and keep.pooling:
            if keep.pooling == "last":  # the norm of one token instead of all
                normed = structure.final_norm(pool(hidden_states, rows, "last"))
            else:
                normed = pool(structure.final_norm(hidden_states), rows, "mean")
            states.pooled[batch, n_layers] = normed.float().cpu()
        done += int(rows.sum())
        progress(done, n_tokens, "hidden states")
    return states


def gather(tokens: Tensor, offsets: Sequence[int], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Take some prompts' states out of states that lie end to end.

    Args:
        tokens: (n_tokens, hidden_size).
        offsets: where each prompt begins, and the end.
        rows: the prompts wanted.

    Returns:
        (batch, longest, hidden_size), padded on the right with zeros, and (batch,) lengths.
    """
    lengths = [offsets[row + 1] - offsets[row] for row in rows]
    padded = tokens.new_zeros(len(rows), max(lengths), tokens.shape[-1])
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        padded[i, :length] = tokens[offsets[row] : offsets[row + 1]]
    return padded, torch.tensor(lengths, dtype=torch.int64)


def _tokens(n_tokens: int, hidden_size: int, dtype: torch.dtype, wanted: bool) -> Tensor | None:
    return torch.empty(n_tokens, hidden_size, dtype=dtype) if wanted else None


def _scatter(
    target: Tensor, hidden_states: Tensor, batch: Sequence[int], offsets: Sequence[int]
) -> None:
    """Write each row's real tokens to its place among the states that lie end to end."""
    on_cpu = hidden_states.to(target.device)
    for row, index in enumerate(batch):
        start, stop = offsets[index], offsets[index + 1]
        target[start:stop] = on_cpu[row, : stop - start]
