"""How much memory this process has of its own.

Pages of mapped files (weights, states past the budget) are left out: the system reads them when
they are touched, and forgets them when memory is short.
"""

from __future__ import annotations

import threading
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_SECONDS = 0.05


def own_memory_bytes() -> int:
    """Return the bytes of memory that are this process's own; all resident ones off Linux."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Watches the process's own memory for as long as it is entered.

    Attributes:
        bytes: the most seen so far.
    """

    def __init__(self) -> None:
        self.bytes = own_memory_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS):
            self.bytes = max(self.bytes, own_memory_bytes())
