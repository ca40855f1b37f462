"""A disk that is full at any write: one sentence, nothing half-written, and a run that goes on."""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers.modeling_utils
from small_run import contents, run

import polylens.artefacts
from polylens.errors import DiskFullError, StorageError

# Everything through which a run writes: (owner, name). Files are opened through io.open.
_WRITES: tuple[tuple[Any, str], ...] = (
    (polylens.artefacts, "save_file"),
    (transformers.modeling_utils, "safe_save_file"),
    (tempfile, "mkdtemp"),
    (tempfile, "mkstemp"),
    (os, "mkdir"),
    (os, "fsync"),
    (os, "rename"),
    (io, "open"),
)


def _writes(name: str, path: Any = None, mode: Any = "r", *_: Any, **__: Any) -> bool:
    """Whether a call needs room: of a folder that is there, or a file that is read, none does."""
    if name == "mkdir":
        return not Path(path).exists()
    return name != "open" or bool(set(str(mode)) & set("wax+"))


@contextmanager
def disk_full_at(number: int) -> Iterator[list[str]]:
    """Let the so manieth write below fail, and give the names of all; 0 lets none."""
    made: list[str] = []

    def wrap(name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if _writes(name, *arguments, **options):
                made.append(name)
                if len(made) == number:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return write(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in _WRITES:
            patch.setattr(owner, name, wrap(name, getattr(owner, name)))
        yield made


def assert_whole(out: Path) -> None:
    assert not list(out.rglob("*.part")), "something half-written stayed"
    assert not list(out.rglob(".*.part*"))


def fails_with_one_sentence(model: Path, out: Path, number: int) -> bool:
    """Whether the so manieth write was reached, and its failure told as it should be."""
    told = None
    with disk_full_at(number) as made:
        try:
            run(model, out)
        except DiskFullError as error:
            told = error
    assert_whole(out)
    if told is None:
        assert len(made) < number, f"write {number} ({made[number - 1]}) failed and nobody told"
        return False
    assert told.exit_code == 1
    assert "is full; free some space" in str(told)
    assert "\n" not in str(told)
    return True


def test_a_run_goes_on_after_each_of_many_failed_writes(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    number = 1
    while fails_with_one_sentence(tiny_folder, out, number):
        number += 12
    assert number > 30
    assert contents(out) == contents(finished)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_write_of_a_run_may_fail(
    finished: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 0
    while True:
        number += 1
        out = tmp_path / f"run-{number}"
        monkeypatch.setenv("POLYLENS_CACHE", str(tmp_path / f"cache-{number}"))
        if not fails_with_one_sentence(tiny_folder, out, number):
            break
        run(tiny_folder, out)
        assert contents(out) == contents(finished), f"after a failure of write {number}"
    print(f"{number - 1} writes")
    assert number > 100


def test_a_small_disk_that_grows(
    finished: Path, tiny_folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYLENS_CACHE", str(small_disk / "cache"))
    out = small_disk / "run"
    n_full = 0
    for kilobytes in (4, 64, 200, 400, 700, 1000, 2000, 4000, 8000, 64000):
        os.system(f"mount -o remount,size={kilobytes}k '{small_disk}'")
        try:
            run(tiny_folder, out)
        except DiskFullError:
            n_full += 1
            assert_whole(out)
    assert n_full > 3
    assert contents(out) == contents(finished)


def test_a_read_only_disk(finished: Path, tiny_folder: Path, small_disk: Path) -> None:
    os.system(f"mount -o remount,size=64000k,ro '{small_disk}'")
    out = small_disk / "run"
    with pytest.raises(StorageError, match="the system refuses access; check") as told:
        run(tiny_folder, out)
    assert "\n" not in str(told.value)
    assert told.value.exit_code == 2
    os.system(f"mount -o remount,rw '{small_disk}'")
    run(tiny_folder, out)
    os.system(f"mount -o remount,ro '{small_disk}'")
    assert run(tiny_folder, out) == ()  # it is finished, so nothing is written
    assert contents(out) == contents(finished)
