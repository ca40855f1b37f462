"""The trunk pass: every prompt through the model once, keeping the states that are read later.

The crown (layers `boundary_layer` and up) is trained, evaluated and compared from the states that
enter it, and the subspaces are read off one pooled state per layer; so one pass per corpus serves
everything, and the reference states of the untouched model come from it too.

All batches pass through one layer before the next: each weight is read once per corpus, whether it
is in memory or in a file. What need not be computed is not: no logits, no attention masks for
padding (right padding and causal attention: pads never reach real tokens), prompts of one length
in one batch, what all prompts begin with and prompts that occur twice only once, and of the last
layer only the last tokens where no others are read.

Floor: 2 · parameters of the layers run · tokens floating-point operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from polylens import distributed
from polylens.machine import keeping_freed_memory
from polylens.models.structure import Calls, DecoderStructure, LayerCall
from polylens.progress import Progress, silent
from polylens.scratch import Scratch
from polylens.token_budget import best_token_budget

Pooling = Literal["last", "mean"]

# Some hundred calls a layer, in tokens; too little to be worth a measurement.
_BATCH_COST = 32

# A shorter prefix saves less than its attention mask costs.
_MIN_PREFIX = 4


@dataclass(frozen=True)
class Keep:
    """What a trunk pass keeps.

    Attributes:
        pooling: keep one state per prompt and layer: that of the "last" real token, or the "mean"
            over real tokens.
        boundary_layers: keep every real token's input of these layers.
        final: keep every real token's output of the last layer, before the final norm.
    """

    pooling: Pooling | None = None
    boundary_layers: tuple[int, ...] = ()
    final: bool = False

    @property
    def tokens(self) -> bool:
        """Whether states of every token are kept."""
        return self.final or bool(self.boundary_layers)


@dataclass(frozen=True)
class HiddenStates:
    """What a trunk pass kept, in the order of the prompts.

    States of tokens lie end to end: first the prefix that all prompts share, once; then what
    follows it of each prompt.

    Attributes:
        lengths: (n_prompts,) int64, tokens of each prompt, the prefix included.
        prefix_length: tokens that all prompts begin with and that are kept once.
        pooled: (n_prompts, n_layers + 1, hidden_size) float32, one state a prompt and layer; the
            last entry has passed the final norm.
        boundary: layer → (n_kept, hidden_size), what enters that layer.
        final: (n_kept, hidden_size), the last layer's output before the final norm.
    """

    lengths: Tensor
    prefix_length: int = 0
    pooled: Tensor | None = None
    boundary: Mapping[int, Tensor] = field(default_factory=dict)
    final: Tensor | None = None

    @cached_property
    def offsets(self) -> list[int]:
        """Where each prompt's own tokens begin; one more entry for the end."""
        own = self.lengths - self.prefix_length
        first = torch.tensor([self.prefix_length])
        return torch.cumsum(torch.cat([first, own]), 0).tolist()  # type: ignore[no-any-return]

    def tokens(self, kept: Tensor, prompt: int) -> Tensor:
        """Return one prompt's states, (n_tokens, hidden_size), out of `final` or a boundary."""
        own = kept[self.offsets[prompt] : self.offsets[prompt + 1]]
        return torch.cat([kept[: self.prefix_length], own])


def token_batches(
    lengths: Sequence[int], token_budget: int, batch_cost: int = _BATCH_COST
) -> Iterator[list[int]]:
    """Cut prompts into batches of similar length, each of at most `token_budget` padded tokens.

    Of all such cuts through the prompts in order of length it is the cheapest.

    Args:
        lengths: tokens of each prompt.
        token_budget: rows times longest length of a batch; a longer prompt makes a batch of its
            own.
        batch_cost: what a batch costs beside its padded tokens, in tokens.

    Yields:
        Indices of the prompts of one batch, longest first.

    Example:
        >>> list(token_batches([3, 9, 4, 8], token_budget=16))
        [[1], [3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    n = len(order)
    # Of the cheapest cut of what follows; where it is first.
    cost, ends = np.zeros(n + 1, dtype=np.int64), np.zeros(n, dtype=np.int64)
    rows = np.arange(1, n + 1)
    for start in range(n - 1, -1, -1):
        longest = max(1, lengths[order[start]])
        most = min(n - start, max(1, token_budget // longest))
        whole = rows[:most] * longest + cost[start + 1 : start + most + 1]
        best = int(whole.argmin())
        cost[start], ends[start] = whole[best] + batch_cost, start + best + 1
    start = 0
    while start < n:
        yield order[start : ends[start]]
        start = ends[start]


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
        (batch, hidden_size); a mean is float32.
    """
    if pooling == "last":
        return hidden_states[torch.arange(len(lengths), device=lengths.device), lengths - 1]
    total = _sum_of_real(hidden_states, lengths)
    return total / lengths[:, None].to(total.dtype)


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with; each keeps one token of its own.

    Example:
        >>> shared_prefix_length([(1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 7), (1, 2, 3, 4, 5, 9)])
        4
    """
    if len(prompts) < 2:
        return 0
    # What the first and the last in order begin with, all do.
    ordered = sorted(map(tuple, prompts))
    pairs = zip(ordered[0], ordered[-1], strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    length = min(common, min(map(len, prompts)) - 1)
    return length if length >= _MIN_PREFIX else 0


def n_tokens_run(prompts: Sequence[Sequence[int]], *, once: bool = False) -> int:
    """Return how many tokens a trunk pass runs: what prompts share counts once.

    Args:
        prompts: token ids.
        once: prompts that occur twice are run once, as where one state a prompt is kept.
    """
    run = list(dict.fromkeys(map(tuple, prompts))) if once else prompts
    prefix_length = shared_prefix_length(run)
    return prefix_length + sum(len(ids) - prefix_length for ids in run)


@torch.no_grad()
def collect_hidden_states(
    structure: DecoderStructure,
    prompts: Sequence[Sequence[int]],
    keep: Keep,
    *,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    progress: Progress = silent,
) -> HiddenStates:
    """Run every prompt through the model once and keep what `keep` asks for.

    Args:
        structure: the model.
        prompts: token ids, at least one each.
        keep: what to keep.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for the states; None takes memory without limit.
        progress: told the tokens done; one is done when it has passed all layers.

    Returns:
        The states, on the CPU, in the order of the prompts.
    """
    scratch = scratch or Scratch()
    lengths = torch.tensor([len(ids) for ids in prompts], dtype=torch.int64)
    budget = token_budget or best_token_budget(structure, int(lengths.sum()), scratch.batch_bytes)
    # Where one state a prompt is kept, prompts that occur twice are run once.
    unique = list(prompts) if keep.tokens else list(dict.fromkeys(map(tuple, prompts)))
    prefix_length = shared_prefix_length(unique) if structure.can_share_prefix else 0

    def run(part: Sequence[Sequence[int]]) -> HiddenStates:
        with keeping_freed_memory():
            a_pass = _Pass(structure, part, prefix_length, keep, budget, scratch, progress)
            return a_pass.states()

    if distributed.size() == 1:
        states = run(unique)
    else:
        order = sorted(range(len(unique)), key=lambda index: len(unique[index]))
        part = run([unique[index] for index in distributed.own(order)])
        states = _put_together(unique, order, part, scratch)
    if len(unique) < len(prompts) and states.pooled is not None:
        place = {ids: index for index, ids in enumerate(map(tuple, unique))}
        pooled = states.pooled[[place[tuple(ids)] for ids in prompts]]
        return HiddenStates(lengths, states.prefix_length, pooled)
    return states


def _put_together(
    prompts: Sequence[Sequence[int]],
    order: Sequence[int],
    part: HiddenStates,
    scratch: Scratch,
) -> HiddenStates:
    """Make the states of all prompts of those that each process has for its share of `order`."""
    lengths = torch.tensor([len(ids) for ids in prompts], dtype=torch.int64)
    prefix = part.prefix_length
    offsets = HiddenStates(lengths, prefix).offsets

    def prompt_places(indices: list[int]) -> Tensor:
        return torch.tensor(indices, dtype=torch.int64)

    def gathered(own: Tensor, n_rows: int, places: Callable[[list[int]], Tensor]) -> Tensor:
        """Send around what each process has, (n_own, ...), and write it to its places."""
        result = scratch.empty((n_rows, *own.shape[1:]), own.dtype)
        for source in range(distributed.size()):
            place = places(list(order[source :: distributed.size()]))
            mine = source == distributed.rank()
            sent = own if mine else torch.empty(len(place), *own.shape[1:], dtype=own.dtype)
            distributed.send_all(sent.view(torch.uint8), source)
            result[place] = sent
        return result

    def token_places(indices: list[int]) -> Tensor:
        own = [torch.arange(offsets[index], offsets[index + 1]) for index in indices]
        return torch.cat([prompt_places([]), *own])

    def of_tokens(own: Tensor) -> Tensor:
        result = gathered(own[prefix:], offsets[-1], token_places)
        shared = own[:prefix].clone()  # the first process has prompts, if any has
        distributed.send_all(shared.view(torch.uint8), 0)
        result[:prefix] = shared
        return result

    return HiddenStates(
        lengths,
        prefix,
        None if part.pooled is None else gathered(part.pooled, len(prompts), prompt_places),
        {layer: of_tokens(kept) for layer, kept in part.boundary.items()},
        None if part.final is None else of_tokens(part.final),
    )


class _Pass:
    """One pass under way: all batches through each layer in turn."""

    def __init__(
        self,
        structure: DecoderStructure,
        prompts: Sequence[Sequence[int]],
        prefix_length: int,
        keep: Keep,
        token_budget: int,
        scratch: Scratch,
        progress: Progress,
    ) -> None:
        self.structure = structure
        self.keep = keep
        self.progress = progress
        n_layers, hidden_size = structure.n_layers, structure.hidden_size
        self.prefix_length = prefix_length
        self.prefix = list(prompts[0][:prefix_length]) if prompts else []
        self.own = [ids[self.prefix_length :] for ids in prompts]
        own_lengths = [len(ids) for ids in self.own]
        self.lengths = torch.tensor(own_lengths, dtype=torch.int64)
        self.offsets = HiddenStates(self.lengths + self.prefix_length, self.prefix_length).offsets
        self.batches = list(token_batches(own_lengths, token_budget))
        # Without states of the last layers, nothing above the highest boundary need run.
        everything = bool(keep.pooling) or keep.final
        self.n_run = n_layers if everything else max(keep.boundary_layers, default=0)
        self.pooled = (
            scratch.empty((len(prompts), n_layers + 1, hidden_size), torch.float32)
            if keep.pooling
            else None
        )
        self.reads_last_tokens_only = keep.pooling == "last" and not (
            keep.final or n_layers in keep.boundary_layers
        )
        n_kept = self.offsets[-1]
        kept = (n_kept, hidden_size)
        self.boundary = {k: scratch.empty(kept, structure.dtype) for k in keep.boundary_layers}
        self.final = scratch.empty(kept, structure.dtype) if keep.final else None
        with scratch.borrowed():
            self.current = self._room(scratch)
        self.done = 0
        self.n_tokens = n_kept
        self.n_units = max(1, n_kept * self.n_run)  # tokens through a layer

    def states(self) -> HiddenStates:
        """Run the pass."""
        structure, keep = self.structure, self.keep
        self.progress(0, self.n_tokens, "hidden states")
        calls = Calls(structure, self.prefix_length)
        prefix = self._embed(calls)
        for index in range(self.n_run):
            self._keep(self.boundary.get(index), prefix)
            structure.read_ahead(index + 1)
            with structure.loaded(index, index + 1):
                if prefix is not None:
                    prefix = calls.of_prefix()[index](structure.layers[index], prefix)
                    self._step(self.prefix_length)
                if index == structure.n_layers - 1 and self.reads_last_tokens_only:
                    self._last_layer_of_last_tokens(calls)
                    break
                for rows, states in zip(self.batches, self.current, strict=True):
                    call = calls.of_batch(*states.shape[:2])[index]
                    output = self._run(call, index, states)
                    if keep.pooling:
                        self._pool(index, rows, prefix, output)
        else:
            self._keep(self.boundary.get(self.n_run), prefix)
            self._keep(self.final, prefix)
            if keep.pooling:
                self._pool_normed(prefix)
        lengths = self.lengths + self.prefix_length
        return HiddenStates(lengths, self.prefix_length, self.pooled, self.boundary, self.final)

    def _room(self, scratch: Scratch) -> list[Tensor]:
        """Room for the states of every batch, (batch, seq_len, hidden_size) each."""
        structure = self.structure
        shapes = [(len(rows), len(self.own[rows[0]])) for rows in self.batches]
        size = (sum(rows * longest for rows, longest in shapes), structure.hidden_size)
        if _fits_on(structure.device, size[0] * size[1] * structure.dtype.itemsize):
            room = torch.empty(size, dtype=structure.dtype, device=structure.device)
        else:
            room = scratch.empty(size, structure.dtype)
        parts = room.split([rows * longest for rows, longest in shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]

    def _embed(self, calls: Calls) -> Tensor | None:
        """Fill the room with the embeddings; return those of the prefix, (1, length, d)."""
        prefix = None
        if calls.prefix is not None and self.batches:
            inputs = self.structure.layer_inputs(
                torch.tensor([self.prefix]), calls.prefix.recording
            )
            prefix = inputs.hidden_states
        for rows, states in zip(self.batches, self.current, strict=True):
            cache = None if calls.prefix is None else calls.prefix.extending
            ids = pad_right([self.own[row] for row in rows])
            states.copy_(self.structure.layer_inputs(ids, cache).hidden_states)
        return prefix

    def _run(self, call: LayerCall, index: int, states: Tensor) -> Tensor:
        """Run one batch through one layer, in place; return the output on the device."""
        output = call(self.structure.layers[index], states.to(self.structure.device))
        states.copy_(output)
        self._step(states.shape[0] * states.shape[1])
        return output

    def _step(self, n_tokens: int) -> None:
        self.done = min(self.n_units, self.done + n_tokens)
        self.progress(self.done * self.n_tokens // self.n_units, self.n_tokens, "hidden states")

    def _keep(self, target: Tensor | None, prefix: Tensor | None) -> None:
        """Write the states of every real token, as they are now, to where they are kept."""
        if target is None:
            return
        if prefix is not None:
            target[: self.prefix_length] = prefix[0].to(target.device)
        for rows, states in zip(self.batches, self.current, strict=True):
            on_cpu = states.to(target.device)
            for row, prompt in enumerate(rows):
                start, stop = self.offsets[prompt], self.offsets[prompt + 1]
                target[start:stop] = on_cpu[row, : stop - start]

    def _pool(self, entry: int, rows: Sequence[int], prefix: Tensor | None, states: Tensor) -> None:
        assert self.pooled is not None
        lengths = self.lengths[list(rows)].to(states.device)
        if self.keep.pooling == "last" or prefix is None:
            assert self.keep.pooling is not None
            pooled = pool(states, lengths, self.keep.pooling)
        else:
            total = _sum_of_real(states, lengths) + prefix[0].float().sum(0)
            pooled = total / (lengths + self.prefix_length)[:, None].to(total.dtype)
        self.pooled[list(rows), entry] = pooled.float().cpu()

    def _pool_normed(self, prefix: Tensor | None) -> None:
        structure = self.structure
        if prefix is not None:
            prefix = structure.final_norm(prefix)
        for rows, states in zip(self.batches, self.current, strict=True):
            on_device = states.to(structure.device)
            if self.keep.pooling == "last":  # the norm of one token instead of all
                lengths = self.lengths[list(rows)].to(structure.device)
                last = pool(on_device, lengths, "last")[:, None]
                self._pool_last_normed(rows, last)
            else:
                self._pool(structure.n_layers, rows, prefix, structure.final_norm(on_device))

    def _pool_last_normed(self, rows: Sequence[int], last: Tensor) -> None:
        assert self.pooled is not None
        normed = self.structure.final_norm(last)[:, 0]
        self.pooled[list(rows), self.structure.n_layers] = normed.float().cpu()

    def _last_layer_of_last_tokens(self, calls: Calls) -> None:
        """Run the last layer where only the last tokens' outputs are read."""
        assert self.pooled is not None
        structure = self.structure
        index = structure.n_layers - 1
        for rows, states in zip(self.batches, self.current, strict=True):
            call = calls.of_batch(*states.shape[:2])[index]
            last = (self.lengths[list(rows)] - 1)[:, None].to(structure.device)
            output = structure.run_at(index, call, states.to(structure.device), last)
            self.pooled[list(rows), index] = output[:, 0].float().cpu()
            self._pool_last_normed(rows, output)
            self._step(states.shape[0] * states.shape[1])
        self._step(self.n_units)


def gather(tokens: Tensor, offsets: Sequence[int], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Take some prompts' own states out of states that lie end to end.

    Args:
        tokens: (n_kept, hidden_size).
        offsets: where each prompt's own tokens begin, and the end.
        rows: the prompts wanted.

    Returns:
        (batch, longest, hidden_size), padded on the right with zeros, and (batch,) lengths.
    """
    lengths = [offsets[row + 1] - offsets[row] for row in rows]
    padded = tokens.new_zeros(len(rows), max(lengths), tokens.shape[-1])
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        padded[i, :length] = tokens[offsets[row] : offsets[row + 1]]
    return padded, torch.tensor(lengths, dtype=torch.int64)


def _sum_of_real(hidden_states: Tensor, lengths: Tensor) -> Tensor:
    """Sum over real tokens, (batch, hidden_size) float32; pads may hold anything."""
    real = torch.arange(hidden_states.shape[1], device=lengths.device) < lengths[:, None]
    return torch.where(real[..., None], hidden_states, 0).sum(1, dtype=torch.float32)


def _fits_on(device: torch.device, n_bytes: int) -> bool:
    """Whether the states of all batches may stay on the device, rather than in main memory."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return n_bytes <= free // 4
