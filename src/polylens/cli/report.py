"""`polylens report`: write a run's report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polylens.artefacts import write_text
from polylens.cli.console import out
from polylens.report import read_report_data, render_report
from polylens.run_folder import RunFolder


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out_file: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Page to write; default: the run's report.html."),
    ] = None,
) -> None:
    """Write the report of a run again, from its saved files alone.

    **Example**

        polylens report runs/first
    """
    folder = RunFolder(run)
    target = out_file or folder.report
    write_text(target, render_report(read_report_data(folder)))
    out.print(f"  report {target}", highlight=False, soft_wrap=True)
