"""Several processes on one job: who does what, and how results come together.

Started by `accelerate launch` or `torchrun`, every process runs the same program. The trunk pass
and each training step share out the prompts; gradients and states are put together, so that all
processes go on with the same numbers; the first one alone writes files. Alone in the world, every
function here does nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from polylens.errors import DistributedError

T = TypeVar("T")

# A process waits this long for the others: generation and saving on the first one take a while.
_TIMEOUT = datetime.timedelta(hours=6)


def start() -> None:
    """Join the other processes of a distributed launch, if this is one of several.

    Raises:
        DistributedError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    from accelerate import PartialState

    with _lost_peers():
        PartialState(timeout=_TIMEOUT)


def stop() -> None:
    """Leave the other processes."""
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _together() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _together() else 1


def is_first() -> bool:
    """Whether this process writes the files and talks to the user."""
    return rank() == 0


def own(items: Sequence[T]) -> list[T]:
    """Return this process's share of `items`: every size-th, from rank."""
    return list(items[rank() :: size()])


def wait() -> None:
    """Wait until every process has come here."""
    if _together():
        with _lost_peers():
            dist.barrier()


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if not _together():
        return
    with _lost_peers():
        for tensor in tensors:
            there = _on_wire(tensor)
            dist.all_reduce(there)
            if there is not tensor:
                tensor.copy_(there)


def send_all(tensor: Tensor, source: int) -> None:
    """Fill `tensor` on every process with what it holds on `source`."""
    if _together():
        with _lost_peers():
            there = _on_wire(tensor)
            dist.broadcast(there, source)
            if there is not tensor:
                tensor.copy_(there)


def collect_all(items: Sequence[T]) -> list[T]:
    """Put together what each process made of its share (see `own`), in the original order."""
    if not _together():
        return list(items)
    parts: list[Any] = [None] * size()
    with _lost_peers():
        dist.all_gather_object(parts, list(items))
    merged: list[T] = []
    for index in range(max(map(len, parts))):
        merged.extend(part[index] for part in parts if index < len(part))
    return merged


def from_first(value: T) -> T:
    """Return what the first process has."""
    if not _together():
        return value
    box: list[Any] = [value]
    with _lost_peers():
        dist.broadcast_object_list(box, 0)
    found: T = box[0]
    return found


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process through before the others: it makes what they find made."""
    if not is_first():
        wait()
    try:
        yield
    finally:
        if is_first():
            wait()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _on_wire(tensor: Tensor) -> Tensor:
    """NCCL moves tensors between GPUs only; gloo takes them from where they are."""
    if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor


@contextlib.contextmanager
def _lost_peers() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:  # torch has no narrower class for gloo
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DistributedError(
            f"all {os.environ.get('WORLD_SIZE', '')} processes must stay alive, but one was lost "
            f"({reason[:160]}); see its output, then run the same command again: finished stages "
            "are kept"
        ) from error
