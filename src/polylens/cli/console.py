"""How the command line speaks: progress with time left, tables, and errors in one line."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

# A file or a pipe has no width: tables there are as wide as they need, up to this.
_FILE_COLUMNS = 140

out = Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS)
err = Console(stderr=True)

# Without a terminal, a line of progress this often; a log should show life, not fill up.
_QUIET_SECONDS = 20.0

# A program that watches is told this often at most.
_LINE_SECONDS = 0.5


class ProgressBars:
    """Draw a bar for each piece of work on a terminal; print a line now and then elsewhere."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown and not err.quiet
        self._bars: RichProgress | None = None
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, float] = {}
        self._last_line = 0.0

    def __enter__(self) -> ProgressBars:
        if self._shown and err.is_terminal:
            self._bars = RichProgress(
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=err,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Take note of progress."""
        if not self._shown:
            return
        now = time.monotonic()
        if done == 0 or what not in self._started:
            self._started[what] = self._last_line = now
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done, total=total)
            if done >= total:
                self._bars.remove_task(self._tasks.pop(what))
        elif 0 < done < total and now - self._last_line > _QUIET_SECONDS:
            left = (now - self._started[what]) / done * (total - done)
            err.print(f"  {what}: {done} of {total}, {duration(left)} left", highlight=False)
            self._last_line = now


class ProgressLines:
    """Write progress to stderr as JSON, one object a line, for a program that watches.

    A line holds the `stage`, and from the first piece of work on `what`, `done`, `total`, and
    `seconds_left` (null as long as nothing is done).
    """

    def __init__(self) -> None:
        self._stage: str | None = None
        self._what: str | None = None
        self._started = self._last_line = 0.0

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stage(self, name: str) -> None:
        """Take note of a stage that starts."""
        self._stage, self._what = name, None
        self._write({})

    def __call__(self, done: int, total: int, what: str) -> None:
        """Take note of progress."""
        now = time.monotonic()
        if what != self._what or done == 0:
            self._what, self._started = what, now
        elif done < total and now - self._last_line < _LINE_SECONDS:
            return
        left = (now - self._started) / done * (total - done) if done else None
        self._last_line = now
        self._write({"what": what, "done": done, "total": total, "seconds_left": left})

    def _write(self, values: dict[str, Any]) -> None:
        if not err.quiet:
            typer.echo(json.dumps({"stage": self._stage, **values}, ensure_ascii=False), err=True)


def duration(seconds: float) -> str:
    """Say a time span: 42 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(n_bytes: float) -> str:
    """Say a size in decimal units: 98 MB, 1.1 GB."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout; the first column is text, the others are figures."""
    drawn = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    out.print(drawn)


def print_error(error: Exception) -> None:
    """Print an error to stderr in one line."""
    err.print("[red]Error:[/red]", escape(str(error)), highlight=False, soft_wrap=True)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value to stdout as JSON; on one line without `indent`."""
    if not out.quiet:
        typer.echo(json.dumps(value, ensure_ascii=False, indent=indent))


def set_up_logging(verbose: int) -> None:
    """Show warnings, or more with -v and -vv; quieten the libraries below."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("polylens").setLevel(level)
    if verbose < 2:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        warnings.simplefilter("ignore", FutureWarning)
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
