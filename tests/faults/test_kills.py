"""A run that is killed at any moment, and started again, ends in the bytes of one that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from small_run import contents, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children of a fork")


def start_and_kill(model: Path, out: Path, delay: float) -> bool:
    """Run in a child, and kill that after some seconds; tell whether it was still at work."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(model, out)
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0, "a run failed after a kill"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), "a run failed after a kill"
    return code == -signal.SIGKILL


@pytest.mark.parametrize(
    "n_kills", [6, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(
    n_kills: int,
    finished: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = random.Random(n_kills)
    monkeypatch.setenv("POLYLENS_CACHE", str(tmp_path / "timed"))
    started = time.monotonic()
    run(tiny_folder, tmp_path / "timed" / "run")
    seconds = time.monotonic() - started
    killed = 0
    for number in range(10 * n_kills):  # far more than it takes
        if killed == n_kills:
            break
        out = tmp_path / f"run-{number}"
        monkeypatch.setenv("POLYLENS_CACHE", str(tmp_path / f"cache-{number}"))
        # Short delays now and then: the first steps of a run are killed, too.
        while killed < n_kills and start_and_kill(
            tiny_folder, out, moments.random() ** 2 * seconds
        ):
            killed += 1
        run(tiny_folder, out)
        assert contents(out) == contents(finished)
    assert killed == n_kills
