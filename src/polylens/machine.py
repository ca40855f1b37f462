"""What this machine does best, measured once and kept in the cache.

How fast matrix products are, whether bfloat16 is faster than float32, how many tokens a batch
should have (`polylens.token_budget`): it depends on processor, threads and libraries, so it is
measured rather than guessed. The answers are kept, so that a run repeated on one machine has the
same batches, and so the same numbers to the last bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from polylens import distributed
from polylens.artefacts import read_object, write_json
from polylens.cache import cache_folder
from polylens.errors import StorageError

# A narrower dtype rounds more; it has to be worth that.
_MIN_SPEEDUP = 1.5

# glibc's names for the settings of malloc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def computing_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in when the user leaves it open.

    Args:
        stored: the dtype that the weights are stored in.
        device: where to compute.

    Returns:
        The stored dtype on an accelerator, and on a CPU whose matrix products are at least
        one and a half times as fast in it as in float32; else float32.
    """
    if device.type != "cpu" or stored == torch.float32:
        return stored

    def measure() -> bool:
        fast = matmul_flops(device, stored, seconds=0.2)
        return fast > _MIN_SPEEDUP * matmul_flops(device, torch.float32, seconds=0.2)

    is_faster = remembered(f"{stored} is faster", measure)
    return stored if is_faster else torch.float32


def matmul_flops(
    device: torch.device, dtype: torch.dtype = torch.float32, *, seconds: float = 0.5
) -> float:
    """Measure the floating-point operations a second of a matrix product of 1,024 rows."""
    a = torch.ones(1024, 1024, device=device, dtype=dtype)
    b = torch.ones(2048, 1024, device=device, dtype=dtype)
    out = torch.empty(1024, 2048, device=device, dtype=dtype)

    def multiply() -> None:
        torch.mm(a, b.T, out=out)
        if device.type != "cpu":
            out[0, 0].item()  # wait for it

    return 2 * 1024 * 1024 * 2048 / _seconds_of(multiply, seconds)


def device_name(device: torch.device) -> str:
    """Return what computes, in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Use only operations that give the same bits every time, for a while.

    A CPU does so anyway; on a GPU some operations are slower, and torch refuses those that have no
    such form.
    """
    if not enabled:
        yield
        return
    # Read by cuBLAS when it is first used in a process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# Uses of `keeping_freed_memory` that are under way, one within the other.
_keepers = 0


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Have freed memory kept for the next allocation while a lot is computed.

    A layer's activations are tens of megabytes, freed and taken again at every operation. glibc
    gives blocks of that size back to the system, which must clear every page when they are taken
    again: up to a third of the time of a trunk pass (docs/performance.md). Afterwards, what is free
    is given back. Other systems than Linux with glibc are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    global _keepers
    _keepers += 1
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        _keepers -= 1
        if not _keepers:
            libc.mallopt(_M_MMAP_MAX, 2**16)
            libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**26)
            libc.malloc_trim(0)


def _seconds_of(work: Callable[[], None], at_least: float) -> float:
    """Seconds of one call, averaged over calls for `at_least` so long, after a first one."""
    work()
    n_calls, started = 0, time.perf_counter()
    while True:
        work()
        n_calls += 1
        if (elapsed := time.perf_counter() - started) >= at_least:
            return elapsed / n_calls


def remembered(what: str, measure: Callable[[], Any]) -> Any:
    """Return what was measured before on this machine, or measure it now; one answer for all."""
    where = (platform.node(), device_name(torch.device("cpu")), torch.get_num_threads())
    key = f"{what} | {' '.join(map(str, where))} | torch {torch.__version__}"
    answer = None
    if distributed.is_first():
        path = cache_folder() / "machine.json"
        known: dict[str, Any] = {}
        with contextlib.suppress(StorageError):  # also a damaged file: measured again
            known = read_object(path, dict) if path.exists() else {}
        if key not in known:
            known[key] = measure()
            with contextlib.suppress(StorageError):  # it costs time only
                write_json(path, known)
        answer = known[key]
    return distributed.from_first(answer)
