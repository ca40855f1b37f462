"""Two processes give what one does; one that dies ends the job with a clear word."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polylens import distributed
from polylens.run_folder import STAGES

JOB = Path(__file__).parent / "distributed_job.py"


def launch(n: int, command: list[str], **environment: str) -> list[subprocess.Popen[str]]:
    """Start `n` processes as torchrun does, without its agent, which would end the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ,
        **environment,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(n),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if n > 1 else shared,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Wait for all; return exit status, stdout and stderr of each."""
    results = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=240)
        results.append((process.returncode, stdout, stderr))
    return results


def test_two_processes_give_what_one_does(tiny_folder: Path, tmp_path: Path) -> None:
    results = []
    for n in (1, 2):
        out = tmp_path / str(n)
        out.mkdir()
        for status, _, stderr in finish(launch(n, [str(JOB), str(tiny_folder), str(out)])):
            assert status == 0, stderr
        results.append([load_file(out / f"{rank}.safetensors") for rank in range(n)])
    (alone,), (first, second) = results
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        if name.startswith("change."):
            continue
        assert (first[name] - expected).norm() <= 1e-5 * expected.norm(), name
    changes = [
        torch.cat([t.flatten() for k, t in one.items() if k.startswith("change.")])
        for one in (first, alone)
    ]
    # AdamW makes as much of a gradient that is rounding alone as of any other.
    assert (changes[0] - changes[1]).norm() <= 1e-2 * changes[1].norm()


def test_a_process_that_dies_ends_the_others_with_a_clear_word(
    tiny_folder: Path, tmp_path: Path
) -> None:
    first, second = finish(launch(2, [str(JOB), str(tiny_folder), str(tmp_path), "crash"]))
    assert second[0] == 9
    assert first[0] != 0
    assert "all 2 processes must stay alive, but one was lost" in first[2]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_by_two_processes_is_one_run(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        "-m",
        "polylens",
        *("enhance", "--model", str(tiny_folder), "--languages", "sw", "--out", str(out)),
        *("train.rows=6", "train.max_tokens=512", "probe.texts_per_language=6"),
        *("probe.max_tokens=512", "evaluate.rows=4", "evaluate.max_new_tokens=3"),
        *("gate.text_margin=9", "gate.choice_margin=9", "gate.steps=2"),
    ]
    first, second = finish(launch(2, command))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "Done in" in first[1]
    assert not second[1]  # one of them talks
    stages = (out / "journal.jsonl").read_text().count('"stage"')
    assert stages == len(STAGES)
    again, _ = finish(launch(2, command))
    assert "Nothing to do" in again[1]


def test_alone_there_is_nothing_to_share() -> None:
    tensor = torch.ones(3)
    distributed.add_up([tensor])
    distributed.send_all(tensor, 0)
    distributed.wait()
    with distributed.first_alone():
        assert tensor.tolist() == [1, 1, 1]
    assert distributed.own([1, 2, 3]) == distributed.collect_all([1, 2, 3]) == [1, 2, 3]
    assert (distributed.rank(), distributed.size(), distributed.is_first()) == (0, 1, True)
