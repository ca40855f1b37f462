"""Room for large tensors: in memory up to a budget, in memory-mapped files beyond it.

A mapped file costs no memory of its own: the operating system writes it out when memory is short.
The files have no name, so nothing is left behind, however the process ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from polylens.artefacts import readable_storage_errors
from polylens.cache import cache_folder

# Small tensors stay in memory whatever the budget: a file of a few pages saves nothing.
_SMALL_BYTES = 2**20

# Of the memory that is free at the start; the rest is left to the system and its file cache.
_SHARE = 0.8


def default_memory() -> int:
    """Return the bytes of memory that a process may use when the user sets no limit.

    The processes that a launcher starts on one machine share it.
    """
    n_sharing = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return int(_SHARE * psutil.virtual_memory().available / n_sharing)


class Scratch:
    """Hands out uninitialised tensors on the CPU.

    Attributes:
        budget_bytes: of the tensors that may be in memory; None sets no limit.
        batch_bytes: that the activations of a batch should take at most; None sets no limit.
        used_bytes: of those handed out in memory.
        spilled_bytes: of those handed out in files.
    """

    def __init__(
        self,
        budget_bytes: int | None = None,
        folder: Path | None = None,
        batch_bytes: int | None = None,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.batch_bytes = batch_bytes
        self.used_bytes = 0
        self.spilled_bytes = 0
        self._folder = folder

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of `shape`, contents undefined.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        n_bytes = math.prod(shape) * dtype.itemsize
        over = self.budget_bytes is not None and self.used_bytes + n_bytes > self.budget_bytes
        if not over or n_bytes <= _SMALL_BYTES:
            self.used_bytes += n_bytes
            return torch.empty(shape, dtype=dtype)
        self.spilled_bytes += n_bytes
        return self._mapped(n_bytes).view(dtype).view(shape)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of `shape` filled with 0."""
        tensor = self.empty(shape, dtype)
        return tensor.zero_()

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[None]:
        """Count what is handed out in here as given back at the end."""
        used = self.used_bytes
        try:
            yield
        finally:
            self.used_bytes = used

    def _mapped(self, n_bytes: int) -> Tensor:
        folder = self._folder or cache_folder() / "scratch"
        with readable_storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder)
            try:
                os.truncate(handle, n_bytes)
                if hasattr(os, "posix_fallocate"):
                    # Reserved now: a disk that fills later would end the process without a word.
                    os.posix_fallocate(handle, 0, n_bytes)
                return torch.from_file(name, shared=True, size=n_bytes, dtype=torch.uint8)
            finally:
                os.close(handle)
                os.unlink(name)
