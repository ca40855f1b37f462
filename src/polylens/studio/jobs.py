"""Runs as processes of their own, started, watched, stopped and resumed by their folder's name.

A run is the command line's `enhance`, so whatever happens to it leaves the studio alone, and a run
goes on when the studio ends. What is known about one is read from files: the run's journal, and
beside the runs, in `.studio/NAME`, the configuration, what identifies the process, and what it
wrote. So a studio that is started again finds the runs that the last one left.

One run at a time: two would share cores and memory, and each be slower than half.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from polylens.artefacts import (
    load_tensors,
    read_json,
    readable_storage_errors,
    write_json,
    write_text,
)
from polylens.config import RunConfig, dump_yaml, load_config
from polylens.errors import RunError, StorageError
from polylens.locks import alone_in, is_held
from polylens.run_folder import STAGES, RunFolder
from polylens.studio.folders import Folders, is_run_name

State = Literal["running", "elsewhere", "finished", "failed", "stopped"]
STATES: Mapping[State, str] = {
    "running": "under way",
    "elsewhere": "under way, by a command elsewhere",
    "finished": "finished",
    "failed": "failed",
    "stopped": "stopped",
}

# A run survives a kill at any moment; this long it may take to go by itself.
_PATIENCE_SECONDS = 10.0

_TAIL_BYTES = 64 * 1024

# What a line of progress says; a library may print other JSON.
_PROGRESS = {"stage", "what", "done", "total", "seconds_left"}


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        state: "elsewhere" if a command that the studio did not start is at work; "stopped" is
            everything that is neither under way, nor finished, nor failed.
        n_finished: stages that the journal notes, of `polylens.run_folder.STAGES`.
        stage: under way; None before the first, and where nothing is.
        what: piece of work, e.g. "training"; None if none was told.
        done: units of it that are done.
        total: all units of it.
        seconds_left: for it; None if not known.
        error: in one sentence, why it failed.
    """

    state: State
    n_finished: int
    stage: str | None = None
    what: str | None = None
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    error: str | None = None


@dataclass
class Jobs:
    """The runs of a folder.

    Attributes:
        folders: which paths may be touched.
    """

    folders: Folders
    _children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, config: RunConfig) -> None:
        """Start a new run.

        Raises:
            UsageError: the name is no plain name, or is taken.
            RunError: the machine is busy, or the configuration leads out of the folders.
        """
        with self._alone():
            self.folders.new_run(name)
            self.folders.check(config)
            write_text(self._notes(name) / "run.yaml", dump_yaml(config))
            self._spawn(name, self._notes(name) / "run.yaml")

    def resume(self, name: str) -> None:
        """Go on with a run that was stopped or has failed.

        Raises:
            UsageError: there is no such run.
            RunError: it is under way or finished, the machine is busy, or the run leads out of the
                folders.
        """
        with self._alone():
            if name not in self.names():
                self.folders.run(name)  # says what is wrong with the name
            status = self.status(name)
            if status.state in ("running", "elsewhere", "finished"):
                raise RunError(
                    f"a run to resume must be stopped, but {name} is {STATES[status.state]}"
                )
            resolved = RunFolder(self.folders.run_path(name)).resolved
            path = resolved if resolved.exists() else self._notes(name) / "run.yaml"
            self.folders.check(load_config(path))
            self._spawn(name, path)

    def stop(self, name: str) -> None:
        """End a run; the stages that are finished are kept, and a training's last checkpoint.

        Raises:
            UsageError: the name is no plain name.
            RunError: it is not under way, or a command elsewhere is at work on it.
        """
        process = self._process(name)
        if process is None:
            raise RunError(f"a run to stop must be the studio's and under way, but {name} is not")
        path = self._notes(name) / "process.json"
        write_json(path, {**read_json(path), "stopped": True})
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_PATIENCE_SECONDS)
            except psutil.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(_PATIENCE_SECONDS)

    def running(self) -> str | None:
        """Return the name of the run that is under way, whoever started it."""
        ours = (name for name in self._noted() if self._process(name) is not None)
        others = (name for name in self.folders.runs_there() if is_held(self.folders.runs / name))
        return next(itertools.chain(ours, others), None)

    def names(self) -> list[str]:
        """Return the names of all runs; first those that have no folder yet, then the newest."""
        found = self.folders.runs_there()
        return [*(name for name in self._noted() if name not in found), *found]

    def status(self, name: str) -> Status:
        """Tell how far a run is.

        Raises:
            UsageError: the name is no plain name.
        """
        finished = {
            entry["stage"] for entry in RunFolder(self.folders.run_path(name)).journal.entries()
        }
        lines = self._tail(name)
        if self._process(name) is not None:
            return Status("running", len(finished), **_last_progress(lines))
        if is_held(self.folders.run_path(name)):
            return Status("elsewhere", len(finished))
        if finished >= set(STAGES):
            return Status("finished", len(finished))
        path = self._notes(name) / "process.json"
        if not path.exists() or read_json(path).get("stopped"):
            return Status("stopped", len(finished))
        return Status("failed", len(finished), error=_last_error(lines))

    def _spawn(self, name: str, configuration: Path) -> None:
        busy = self.running()
        if busy is not None:
            raise RunError(
                f"one run at a time can be under way, and {busy} is; wait until it is finished, or "
                "stop it (it can be resumed)"
            )
        notes = self._notes(name)
        command = [sys.executable, "-m", "polylens", "enhance", str(configuration.resolve())]
        command += ["--out", str(self.folders.run_path(name)), "--progress-lines"]
        with readable_storage_errors(notes):
            notes.mkdir(parents=True, exist_ok=True)
            with (notes / "log.txt").open("wb") as log:
                # A session of its own: Ctrl-C at the studio's terminal does not reach it.
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                )
        self._children[name] = child
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(child.pid).create_time()
            write_json(notes / "process.json", {"pid": child.pid, "started": started})

    def _process(self, name: str) -> psutil.Process | None:
        """Return the process of a run that is under way."""
        child = self._children.get(name)
        if child is not None:
            child.poll()  # clears away a zombie
        path = self._notes(name) / "process.json"
        if not path.exists():
            return None
        known = read_json(path)
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(known["pid"])
            # A number is given again to other processes, but not with the same start.
            same = process.create_time() == known["started"]
            # Its first thread may be a zombie before the last one has ended.
            if same and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def _notes(self, name: str) -> Path:
        return self.folders.runs / ".studio" / self.folders.run_path(name).name

    def _noted(self) -> list[str]:
        """Names of the runs that a studio has started."""
        found = (self.folders.runs / ".studio").glob("*/process.json")
        return [path.parent.name for path in found if is_run_name(path.parent.name)]

    def _tail(self, name: str) -> list[str]:
        path = self._notes(name) / "log.txt"
        if not path.exists():
            return []
        with readable_storage_errors(path), path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Let one user, of one studio, start a run at a time."""
        return alone_in(self.folders.runs / ".studio", wait=True)


def training_log(folder: RunFolder) -> list[Mapping[str, float]]:
    """Return the losses of each step, of a training that is finished or under way."""
    for path in (folder.delta, folder.checkpoint):
        with contextlib.suppress(StorageError):
            _, metadata = load_tensors(path, verify=False)
            return list(metadata["log"])
    return []


def _last_progress(lines: list[str]) -> dict[str, Any]:
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # words, or the line being written
            values = json.loads(line)
            if isinstance(values, dict) and values.keys() <= _PROGRESS:
                return values
    return {}


def _last_error(lines: list[str]) -> str:
    words = [line for line in lines if line.strip() and not line.startswith("{")]
    for line in reversed(words):
        if line.startswith("Error: "):
            return line.removeprefix("Error: ")
    last = f"; its last words: {words[-1]}" if words else ""
    return (
        "the run ended without saying why: the machine was out of memory or restarted, perhaps"
        f"{last}; resume it"
    )
