"""One finished run for all tests of faults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import run

import polylens.machine


@pytest.fixture(scope="session")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that nothing disturbed; do not write to it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("POLYLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(polylens.machine, "matmul_flops", lambda *_, **__: 1.0)
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(tiny_folder, out)
    yield out
    patch.undo()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 64 KB; `mount -o remount` changes it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"mount -t tmpfs -o size=64k tmpfs '{disk}' 2>/dev/null"
    if os.name != "posix" or os.system(command):
        pytest.skip("only the superuser can mount a disk")
    yield disk
    os.system(f"umount -l '{disk}'")
