"""What a run has done: one line of JSON a finished stage, appended and synced.

A stage is finished when its line is there; a line that a kill cut short does not count. The line
holds the checksums of the files that the stage left, so that damage is noticed before they are
used.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polylens.artefacts import file_sha256, parse_json, readable_storage_errors
from polylens.errors import CorruptFileError
from polylens.memory import PeakMemory

LIBRARIES = ("polylens", "torch", "transformers", "tokenizers", "safetensors", "py3langid")


class Journal:
    """The finished stages of one run, in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[dict[str, Any]]:
        """Return every whole line, in order.

        Raises:
            CorruptFileError: a line is damaged.
        """
        with readable_storage_errors(self.path):
            content = self.path.read_bytes() if self.path.exists() else b""
        try:
            lines = content[: content.rfind(b"\n") + 1].decode("utf-8").split("\n")
            entries = [parse_json(line) for line in lines if line]
            for entry in entries:
                if not isinstance(entry["stage"], str):
                    raise TypeError("a stage has no name")
                dict(entry.get("files", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(
                f"{self.path} must hold a finished stage in each line, but is damaged ({error!r}); "
                "delete it and run again: every stage is then done anew"
            ) from error
        return entries

    def finished(self, stage: str) -> dict[str, Any] | None:
        """Return the newest entry of a finished stage; None if it has none."""
        return next((e for e in reversed(self.entries()) if e["stage"] == stage), None)

    def check(self, outputs: Iterable[Path]) -> None:
        """Compare files and folders with what the stages that made them noted.

        Args:
            outputs: of stages; those that nothing is noted of are taken as they are.

        Raises:
            CorruptFileError: one was changed or damaged, or a folder lacks a file.
        """
        noted: dict[str, str] = {}
        for entry in self.entries():
            noted.update(entry.get("files", {}))
        for output in outputs:
            name = output.relative_to(self.path.parent).as_posix()
            for file, sha256 in noted.items():
                if file != name and not file.startswith(f"{name}/"):
                    continue
                path = self.path.parent / file
                with readable_storage_errors(path):
                    if path.is_file() and file_sha256(path) == sha256:
                        continue
                raise CorruptFileError(
                    f"{path} must be as the run left it, but was damaged or changed; restore it, "
                    f"or delete {output} to have it made again"
                )

    @contextmanager
    def stage(self, name: str, outputs: Iterable[Path] = ()) -> Iterator[dict[str, Any]]:
        """Run a stage and note it if it does not raise.

        Args:
            name: of the stage.
            outputs: files and folders that it leaves, whose checksums are noted.

        Yields:
            A dictionary; what is put in is noted too.
        """
        noted: dict[str, Any] = {}
        started = time.monotonic()
        with PeakMemory() as peak:
            yield noted
        self._append(
            {
                "stage": name,
                "seconds": round(time.monotonic() - started, 3),
                "peak_memory_bytes": peak.bytes,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **noted,
                "files": self._checksums(outputs),
                "versions": versions(),
            }
        )

    def _checksums(self, outputs: Iterable[Path]) -> dict[str, str]:
        """Return file → SHA-256, by names within the run.

        But of a model's card, which people edit, and of the report, which is written again at will.
        """
        found = {}
        for output in outputs:
            files = [output] if output.is_file() else sorted(output.rglob("*"))
            for file in files:
                name = file.relative_to(self.path.parent)
                hidden = any(part.startswith(".") for part in name.parts)
                if file.is_file() and not hidden and file.name not in ("README.md", "report.html"):
                    with readable_storage_errors(file):
                        found[name.as_posix()] = file_sha256(file)
        return found

    def _append(self, entry: Mapping[str, Any]) -> None:
        with readable_storage_errors(self.path):
            whole = self.path.read_bytes() if self.path.exists() else b""
            whole = whole[: whole.rfind(b"\n") + 1]  # drop a line that a kill cut short
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.truncate(len(whole))
                file.seek(len(whole))
                file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that the numbers depend on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        found[library] = importlib.metadata.version(library)
    return found
