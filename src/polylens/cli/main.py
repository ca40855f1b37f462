"""The program: its commands, and how errors end it."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from polylens import distributed
from polylens.cli import (
    baseline,
    chat,
    data,
    doctor,
    evaluate,
    export,
    fidelity,
    judge,
    models,
    probe,
    report,
    run,
    search,
    steer,
    studio,
    train,
)
from polylens.cli.console import err, out, print_error, set_up_logging
from polylens.errors import PolyLensError
from polylens.journal import versions

app = typer.Typer(
    name="polylens",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make open models better in the languages they speak badly, without losing English.",
)
app.command("enhance")(run.enhance)
app.command("probe")(probe.probe)
app.command("train")(train.train)
app.command("search")(search.search)
app.command("steer")(steer.steer)
app.command("chat")(chat.chat)
app.command("baseline")(baseline.baseline)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(evaluate.compare)
app.command("fidelity")(fidelity.fidelity)
app.command("mt-bench")(judge.mt_bench)
app.command("judge")(judge.judge)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("studio")(studio.studio)
app.add_typer(models.app, name="models")
app.command("data")(data.data)
app.command("doctor")(doctor.doctor)

_state = {"debug": False}
_INTERRUPTED = 130


def _version(value: bool) -> None:
    if value:
        typer.echo(f"polylens {versions()['polylens']}")
        raise typer.Exit


@app.callback()
def _root(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="More log; twice for all.")
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _state["debug"] = debug
    set_up_logging(verbose)
    distributed.start()
    if not distributed.is_first():  # one of several processes talks
        out.quiet = err.quiet = True


def main() -> None:
    """Run the program; the entry point of `polylens`."""
    try:
        app()
    except PolyLensError as error:
        if _state["debug"]:
            traceback.print_exc()
        err.quiet = False
        print_error(error)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # typer has turned Ctrl-C into it, and says nothing
            err.print("Interrupted. What was finished is kept; run the same command to go on.")
        if not end.code:
            distributed.stop()
        raise
