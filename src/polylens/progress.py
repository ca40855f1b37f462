"""How long work says how far it is: a callable that the command line draws; silent by default."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told how much of a piece of work is done; called often, so it must be cheap."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """Take note that `done` of `total` units are done.

        Args:
            done: finished units, 0 to `total`.
            total: all units.
            what: the piece of work, e.g. "hidden states"; the same text for the whole of it.
        """


def silent(done: int, total: int, what: str) -> None:
    """Say nothing: the default of every library call."""
