"""Weights that stay in their files until a layer needs them.

transformers maps a safetensors file into memory without reading it when the weights keep their
stored dtype on a CPU. Such a model costs no memory of its own: the operating system reads what is
touched and forgets it again under pressure. `materialized` gives some of its modules real weights,
in the dtype and on the device that compute, for as long as they are needed; the engine does so
once a layer and corpus, so a model far larger than memory (or than the GPU) can be run.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# One byte in every page, which is 4 KiB or more wherever torch runs.
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class Streaming:
    """Where, and in which dtype, weights that stay in their files are computed with."""

    device: torch.device
    dtype: torch.dtype


@contextlib.contextmanager
def materialized(modules: Iterable[nn.Module], to: Streaming) -> Iterator[None]:
    """Give modules weights in memory for a while; afterwards they have their stored ones again.

    Args:
        modules: any modules of a mapped model; nesting is free.
        to: device and dtype to compute with.
    """
    stored = [(p, p.data) for module in modules for p in module.parameters()]
    try:
        for parameter, data in stored:
            parameter.data = _converted(data, to)
        yield
    finally:
        for parameter, data in stored:
            parameter.data = data


@contextlib.contextmanager
def loading_itself(
    layers: Iterable[nn.Module], embedding: nn.Module, head: nn.Module | None, to: Streaming
) -> Iterator[None]:
    """Let a mapped model run as any other, for a while: each module has its weights while it runs.

    Args:
        layers: the decoder layers.
        embedding: of the input tokens; only the rows in use are read.
        head: what makes logits, if that is a module.
        to: device and dtype to compute with.
    """
    hooks = []
    entered: list[contextlib.ExitStack] = []
    originals: list[dict[str, Any]] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(materialized([module], to))
        entered.append(stack)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop().close()

    def take_rows(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, ids = used_rows(module, args[0], to)
        originals.append(dict(module.__dict__))
        module.__dict__.update(with_rows(module, rows).__dict__)
        return (ids, *args[1:])

    def give_rows_back(module: nn.Module, args: Any, output: Any) -> None:
        module.__dict__.update(originals.pop())

    try:
        for module in [*layers, *([head] if head is not None else [])]:
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        hooks.append(embedding.register_forward_pre_hook(take_rows))
        hooks.append(embedding.register_forward_hook(give_rows_back, always_call=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def used_rows(embedding: nn.Module, ids: Tensor, to: Streaming) -> tuple[Tensor, Tensor]:
    """Read only those rows of an embedding that some ids use.

    Returns:
        (n_used, hidden_size) rows, and ids of the same shape as `ids` that count within them.
    """
    weight: Any = embedding.weight
    used, inverse = torch.unique(ids.to(weight.device), return_inverse=True)
    rows = weight.detach()[used].to(to.device, to.dtype)
    return rows, inverse.to(to.device)


def with_rows(embedding: nn.Module, rows: Tensor) -> nn.Module:
    """Return a shallow copy of an embedding (with whatever scaling it does) that has other rows."""
    copied: Any = copy.copy(embedding)
    copied.padding_idx = None  # of the whole table; it matters to gradients alone
    copied._parameters = {
        **embedding._parameters,
        "weight": nn.Parameter(rows, requires_grad=False),
    }
    found: nn.Module = copied
    return found


def place_small_parts(decoder: nn.Module, left_out: Iterable[nn.Module], to: Streaming) -> None:
    """Move all buffers, and the weights of all but some modules (layers, embedding, head)."""
    stays = {id(module) for root in left_out for module in root.modules()}
    for module in decoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(to.device)
        if id(module) in stays:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = _converted(parameter.data, to)


def read_ahead(module: nn.Module) -> threading.Thread:
    """Have the operating system read a module's weights while something else computes."""

    def touch() -> None:
        for parameter in module.parameters():
            if parameter.device.type == "cpu":
                flat = parameter.detach().reshape(-1).view(torch.uint8)
                flat[::_PAGE_BYTES].max()

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    return thread


def _converted(data: Tensor, to: Streaming) -> Tensor:
    return data.to(to.device, to.dtype if data.is_floating_point() else None)
