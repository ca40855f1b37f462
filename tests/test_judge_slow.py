"""A real judge: `transformers serve` with the embedded model, which judges badly but answers."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polylens.models.source import resolve
from test_cli_judge import write_answers

pytestmark = pytest.mark.slow

START_SECONDS = 240


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Endpoint and model name of a judge."""
    for library in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(library)
    program = shutil.which("transformers", path=str(Path(sys.executable).parent))
    assert program is not None
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = resolve("smollm2-135m-instruct").folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port),
             "--device", "cpu"],
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        for _ in range(START_SECONDS):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(1)
        else:
            raise AssertionError(log.read_text())
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(30)


def test_a_real_judge(run: Any, server: tuple[str, str]) -> None:
    endpoint, model = server
    before, after = write_answers("old", [3, 4]), write_answers("new", [5, 6])
    judge = [
        "judge", before, after, "--endpoint", endpoint, "--judge", model,
        "--parallel", 1, "--max-tokens", 48, "--json",
    ]  # fmt: skip
    code, out, err = run(*judge)
    assert code == 0, err
    summary = json.loads(out)
    lines = [
        json.loads(line) for line in Path("runs/judge/judgements.jsonl").read_text().splitlines()
    ]
    # Two questions of two turns, graded on both sides and compared in both orders.
    n_asked = 2 * 2 * (2 + 2)
    n_read = sum(line["verdict"] is not None for line in lines)
    assert n_read + len(summary["unreadable"]) == n_asked
    assert summary["now"] == summary["total"]
    assert summary["total"]["requests"] == len(lines)
    assert n_asked <= len(lines) <= 2 * n_asked
    assert summary["total"]["input_tokens"] > 100 * len(lines)
    assert 0 < summary["total"]["output_tokens"] <= 48 * len(lines)
    code, out, err = run(*judge)
    assert code == 0, err
    assert json.loads(out)["now"]["requests"] == 0
