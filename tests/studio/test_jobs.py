"""Runs as processes: started, refused, stopped, resumed, and what is said of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from polylens.config import RunConfig, dump_yaml, load_config
from polylens.errors import RunError, UsageError
from polylens.locks import alone_in
from polylens.run import enhance
from polylens.run_folder import STAGES, RunFolder
from polylens.studio.folders import Folders
from polylens.studio.jobs import Jobs, Status, training_log

SETTINGS: dict[str, Any] = {
    "languages": "sw",
    "probe.texts_per_language": 4,
    "train.rows": 4,
    "train.batch_size": 2,
    "train.retain_choices": 0,
    "evaluate.rows": 2,
    "evaluate.max_new_tokens": 2,
    "gate.text_margin": 9.0,  # two rows of a random model show nothing
    "gate.choice_margin": 9.0,  # nor do its guesses
    "gate.steps": 1,
}


@pytest.fixture
def folders(tmp_path: Path, tiny_folder: Path) -> Folders:
    return Folders(tmp_path / "runs", tiny_folder.parent)


def configure(folders: Folders, **changes: Any) -> RunConfig:
    return load_config(None, {**SETTINGS, "model": folders.model("tiny"), **changes})


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600  # a loaded machine takes long to import torch
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "journal.jsonl"
    }


@pytest.mark.timeout(1200)
def test_a_run_is_stopped_and_resumed_by_another_studio(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # so that bits agree
    jobs = Jobs(folders)
    # Many epochs, so that it can be stopped while it trains.
    config = configure(folders, **{"train.epochs": 30})
    jobs.start("first", config)
    assert jobs.status("first").state == "running"
    with pytest.raises(RunError, match="one run at a time can be under way, and first is"):
        jobs.start("second", config)
    with pytest.raises(RunError, match="must be stopped, but first is under way"):
        jobs.resume("first")
    # A studio that was started anew knows of it.
    other = Jobs(folders)
    assert (other.running(), other.names()) == ("first", ["first"])
    wait(lambda: len(training_log(folders.run("first"))) > 2 if folders.runs_there() else False)
    status = other.status("first")
    assert (status.stage, status.what, status.total) == ("train", "training", 60)
    other.stop("first")
    assert jobs.status("first") == Status("stopped", 1)
    assert jobs.running() is None
    log = training_log(folders.run("first"))
    assert 2 < len(log) < 60
    with pytest.raises(RunError, match="studio's and under way, but first"):
        jobs.stop("first")

    jobs.resume("first")
    wait(lambda: other.status("first").state != "running")
    assert other.status("first") == Status("finished", len(STAGES))
    assert training_log(folders.run("first"))[: len(log)] == log
    with pytest.raises(RunError, match="but first is finished"):
        jobs.resume("first")
    with pytest.raises(UsageError, match="is there already"):
        jobs.start("first", config)
    # As the library would have done it, undisturbed.
    enhance(config, tmp_path / "undisturbed")
    ours, theirs = files(folders.runs / "first"), files(tmp_path / "undisturbed")
    for name in ("resolved.yaml", "subspaces.safetensors", "delta.safetensors", "gate.json"):
        assert ours[name] == theirs[name]


@pytest.mark.timeout(1200)
def test_a_run_that_fails_says_why_and_may_be_mended(folders: Folders) -> None:
    jobs = Jobs(folders)
    jobs.start("first", configure(folders, **{"train.layers": 99}))
    wait(lambda: jobs.status("first").state != "running")
    status = jobs.status("first")
    assert (status.state, status.n_finished) == ("failed", 0)
    assert status.error is not None
    assert "99" in status.error
    assert jobs.names() == ["first"]  # though it has no folder
    assert folders.runs_there() == []


def test_nothing_outside_is_started_resumed_or_stopped(folders: Folders, tmp_path: Path) -> None:
    jobs = Jobs(folders)
    for name in ("../first", "/first", "", ".studio", ".."):
        for act in (lambda n: jobs.start(n, configure(folders)), jobs.resume, jobs.stop):
            with pytest.raises(UsageError):
                act(name)
    with pytest.raises(RunError, match=r"train\.corpus"):
        jobs.start("first", configure(folders, **{"train.corpus": str(tmp_path / "x.jsonl")}))
    elsewhere = RunFolder(folders.runs / "theirs")
    elsewhere.path.mkdir()
    elsewhere.resolved.write_text(
        dump_yaml(configure(folders, **{"evaluate.texts": "/etc/passwd"})), encoding="utf-8"
    )
    with pytest.raises(RunError, match=r"evaluate\.texts"):
        jobs.resume("theirs")
    assert jobs.running() is None


def test_no_file_but_the_studios_own_names_a_process(folders: Folders) -> None:
    """A folder that somebody put there must not have the studio end another process."""
    (folders.runs / ".studio").mkdir(parents=True)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        note = {"pid": sleeper.pid, "started": psutil.Process(sleeper.pid).create_time()}
        for place in ("theirs", ".studio/.."):
            (folders.runs / place).mkdir(exist_ok=True)
            (folders.runs / place / "process.json").write_text(json.dumps(note))
        for name in ("../theirs", "..", "theirs", "../../runs/theirs"):
            with pytest.raises((UsageError, RunError)):
                Jobs(folders).stop(name)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_status_is_read_from_files(folders: Folders) -> None:
    """Of a process that is gone, whose number another process has by now."""
    jobs = Jobs(folders)
    notes = folders.runs / ".studio" / "first"
    notes.mkdir(parents=True)
    process = notes / "process.json"
    process.write_text(json.dumps({"pid": 1, "started": 0.0}))
    progress = json.dumps({"stage": "train", "what": "training", "done": 1, "total": 2})

    def status(log: str) -> Status:
        (notes / "log.txt").write_text(log, encoding="utf-8")
        return jobs.status("first")

    assert status(f"{progress}\nError: no room: free some\n").error == "no room: free some"
    killed = status(f"WARNING something\n{progress}\n")
    assert killed.state == "failed"
    assert "out of memory" in str(killed.error)
    assert "WARNING something" in str(killed.error)
    process.write_text(json.dumps({"pid": 1, "started": 0.0, "stopped": True}))
    assert status(progress) == Status("stopped", 0)
    journal = RunFolder(folders.runs / "first").journal
    journal.path.parent.mkdir()
    for stage in STAGES[:3]:
        with journal.stage(stage):
            pass
    assert status(progress) == Status("stopped", 3)


def test_a_run_of_the_command_line_is_seen_and_left_alone(folders: Folders) -> None:
    """Its folder's lock tells; a studio that resumed it would only be refused by the lock."""
    folder = RunFolder(folders.runs / "theirs")
    folder.path.mkdir(parents=True)
    folder.resolved.write_text(dump_yaml(configure(folders)), encoding="utf-8")
    jobs = Jobs(folders)
    assert jobs.status("theirs") == Status("stopped", 0)
    with alone_in(folder.path):
        assert jobs.status("theirs") == Status("elsewhere", 0)
        assert jobs.running() == "theirs"
        with pytest.raises(RunError, match="but theirs is under way, by a command elsewhere"):
            jobs.resume("theirs")
        with pytest.raises(RunError, match="one run at a time can be under way, and theirs is"):
            jobs.start("first", configure(folders))
        with pytest.raises(RunError, match="studio's and under way, but theirs"):
            jobs.stop("theirs")
    assert jobs.status("theirs") == Status("stopped", 0)
    assert jobs.running() is None


def test_other_json_in_a_runs_log_is_no_progress(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = folders.runs / ".studio" / "first"
    notes.mkdir(parents=True)
    told = {"stage": "train", "what": "training", "done": 1, "total": 2, "seconds_left": 3.0}
    lines = [json.dumps(told), '{"level": "info"}', "[1]", '{"stage": "tra']
    (notes / "log.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(Jobs, "_process", lambda *_: psutil.Process())
    assert Jobs(folders).status("first") == Status("running", 0, **told)
