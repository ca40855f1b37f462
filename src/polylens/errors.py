"""Every error PolyLens raises on purpose, and the exit code each one stands for.

All derive from `PolyLensError`; each also derives from the built-in a caller would expect to catch.
A message is one sentence that says what must hold, what was given and what to do next. The command
line prints it in one line and exits with `exit_code`: 2 for wrong usage or input, 1 for a failure
on the way, 3 for a gate that does not hold.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolyLensError(Exception):
    """Base class of every error that PolyLens raises on purpose."""

    exit_code = 1


class UsageError(PolyLensError, ValueError):
    """Wrong usage or wrong input; nothing was computed."""

    exit_code = 2


class ConfigError(UsageError):
    """A run's configuration is faulty; the message lists all faults at once."""


class LanguageError(UsageError):
    """A language is unknown, missing or used where it cannot be."""


class CorpusError(UsageError):
    """A corpus cannot be read or does not fit the job."""


class ModelError(UsageError):
    """A model cannot be found, or is not a decoder-only language model."""


class SubspaceError(UsageError):
    """Subspaces are out of range, or belong to another model."""


class RunError(UsageError):
    """A run folder cannot be used for this run."""


class MissingExtraError(UsageError, ImportError):
    """An optional library is needed that is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed; run: pip install "
            f"'polylens[{extra}]'"
        )


class StorageError(PolyLensError, OSError):
    """The disk is full, or a file or folder cannot be read or written."""

    exit_code = 2


class DiskFullError(StorageError):
    """The disk is full: nothing half-written stays, and the same command goes on from there."""

    exit_code = 1


class CorruptFileError(StorageError):
    """A file of ours fails its checksum or cannot be parsed."""


class DownloadError(PolyLensError, ConnectionError):
    """Weights could not be fetched."""


class TrainingError(PolyLensError, ArithmeticError):
    """Training diverged or met a value that is not finite; the last good state is kept."""


class GateError(PolyLensError, ArithmeticError):
    """Harm to a protected language cannot be ruled out."""

    exit_code = 3


class DistributedError(PolyLensError, ConnectionError):
    """A process of a distributed run was lost, or cannot be reached."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `", did you mean 'x'?"` for the known name closest to `name`, or an empty string.

    Example:
        >>> nearest("swahilli", ["swahili", "somali"])
        ", did you mean 'swahili'?"
        >>> nearest("qqq", ["swahili"])
        ''
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""
