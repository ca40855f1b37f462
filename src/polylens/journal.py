"""What a run has done: one line of JSON a finished stage, appended and synced.

A stage is finished when its line is there; a line that a kill cut short does not count.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polylens.artefacts import readable_storage_errors
from polylens.memory import PeakMemory

LIBRARIES = ("polylens", "torch", "transformers", "tokenizers", "safetensors", "py3langid")


class Journal:
    """The finished stages of one run, in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[dict[str, Any]]:
        """Return every whole line, in order."""
        if not self.path.exists():
            return []
        with readable_storage_errors(self.path):
            lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def finished(self, stage: str) -> dict[str, Any] | None:
        """Return the newest entry of a finished stage; None if it has none."""
        return next((e for e in reversed(self.entries()) if e["stage"] == stage), None)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Run a stage and note it if it does not raise.

        Args:
            name: of the stage.

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
                "versions": versions(),
            }
        )

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
