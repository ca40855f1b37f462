"""One command at a time in a folder; any number on one cache."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from small_run import RUNTIME, contents, run

from polylens.errors import RunError, StorageError
from polylens.evaluation.mt_bench import answer_sides
from polylens.evaluation.sides import evaluate_sides
from polylens.locks import alone_in

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks are the system's")


def test_a_second_run_in_one_folder_is_refused(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with alone_in(out), pytest.raises(RunError, match="one command at a time"):
        run(tiny_folder, out)
    assert os.listdir(out) == [".lock"]
    assert "report" in run(tiny_folder, out)
    with alone_in(out):  # a finished run is only read
        assert run(tiny_folder, out) == ()
    assert contents(out) == contents(finished)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            with alone_in(tmp_path):
                (tmp_path / "held").touch()
                time.sleep(600)
        finally:
            os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.005)
    with pytest.raises(RunError), alone_in(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize(
    "command",
    [
        lambda out: evaluate_sides([], None, out, RUNTIME),  # type: ignore[arg-type]
        lambda out: answer_sides([], [], out, RUNTIME),
    ],
)
def test_evaluations_lock_their_folder(command: Any, tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(RunError, match="one command at a time"):
        command(tmp_path)
    command(tmp_path)


def test_two_runs_on_one_cache_both_end_right(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    children = []
    for out in outs:
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                run(tiny_folder, out)
                code = 0
            finally:
                os._exit(code)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert [contents(out) for out in outs] == [contents(finished)] * 3


def test_folders_that_cannot_be_written(
    finished: Path, tiny_folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.system(f"mount -o remount,size=64m '{small_disk}'")
    os.system(f"cp -r '{finished}' '{small_disk}/finished'")
    os.system(f"mount -o remount,ro '{small_disk}'")
    assert run(tiny_folder, small_disk / "finished") == ()
    with pytest.raises(StorageError, match="refuses access"):
        run(tiny_folder, small_disk / "run")
    monkeypatch.setenv("POLYLENS_CACHE", str(small_disk / "cache"))
    with pytest.raises(StorageError, match="refuses access"):
        run(tiny_folder, small_disk.parent / "run")
