"""What a run leaves, as files that a browser takes: report, delta, the model as an archive."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from polylens.errors import UsageError
from polylens.run_folder import RunFolder

_CHUNK_BYTES = 2**20
_END = bytes(2 * tarfile.BLOCKSIZE)  # of a tar archive

# A report may come with a run that somebody else made: its scripts draw figures, and reach nothing.
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'unsafe-inline'; img-src data: blob:"
)


@dataclass(frozen=True)
class Download:
    """One of a run's results.

    Attributes:
        path: file or folder.
        file_name: that the browser saves it under; None shows it instead.
        media_type: of the content.
        content: piece by piece.
        n_bytes: of the content.
    """

    path: Path
    file_name: str | None
    media_type: str
    content: Iterator[bytes]
    n_bytes: int


def offered(folder: RunFolder) -> list[str]:
    """Return which of a run's results are there: "report", "delta", "model"."""
    return [what for what, path in _paths(folder).items() if path.exists()]


def download(folder: RunFolder, what: str) -> Download:
    """Return one of `offered`.

    Raises:
        UsageError: it is not offered.
    """
    path = _paths(folder).get(what)
    if path is None or not path.exists():
        raise UsageError(
            f"a download must be one of {', '.join(offered(folder)) or 'none yet'}, got {what!r}"
        )
    name = folder.path.name
    if what == "model":
        parts = [_entry(path, inner) for inner in sorted(path.rglob("*")) if inner.is_file()]
        total = sum(len(head) + _padded(n_bytes) for _, head, n_bytes in parts) + len(_END)
        return Download(path, f"{name}.tar", "application/x-tar", _archive(parts), total)
    n_bytes = path.stat().st_size
    if what == "report":
        return Download(path, None, "text/html; charset=utf-8", _pieces(path), n_bytes)
    return Download(
        path, f"{name}-delta.safetensors", "application/octet-stream", _pieces(path), n_bytes
    )


def _paths(folder: RunFolder) -> dict[str, Path]:
    return {"report": folder.report, "delta": folder.delta, "model": folder.model}


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            yield piece


def _entry(folder: Path, file: Path) -> tuple[Path, bytes, int]:
    """A file, its head in a tar archive, and its size."""
    entry = tarfile.TarInfo(f"{folder.parent.name}/{file.relative_to(folder).as_posix()}")
    entry.size = file.stat().st_size
    return file, entry.tobuf(tarfile.GNU_FORMAT), entry.size


def _archive(parts: Sequence[tuple[Path, bytes, int]]) -> Iterator[bytes]:
    """A tar archive, made while it is sent: it takes neither disk nor memory."""
    for file, head, n_bytes in parts:
        yield head
        yield from _pieces(file)
        yield bytes(_padded(n_bytes) - n_bytes)
    yield _END


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
