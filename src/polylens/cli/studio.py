"""`polylens studio`: a local web page to look inside, start runs and compare answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polylens.cli.console import out
from polylens.studio.app import make_app, read_password, serve
from polylens.studio.folders import Folders
from polylens.studio.guard import is_local


def studio(
    runs: Annotated[
        Path, typer.Option(help="Folder of the runs that are shown, and of new ones.")
    ] = Path("runs"),
    models: Annotated[
        Path | None,
        typer.Option(help="Folder of model folders and GGUF files.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of corpora.", show_default=False)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's need a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    password_file: Annotated[
        Path | None,
        typer.Option(
            help="File with a password in its first line; or set POLYLENS_STUDIO_PASSWORD.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Open the studio: a web page, served by this machine, that touches these folders alone.

    **Examples**

        polylens studio

        polylens studio --runs runs --models models --data corpora --port 8000
    """
    password = read_password(host, password_file)
    app = make_app(Folders(runs, models, data), password=password, local=is_local(host))
    shown = f"[{host}]" if ":" in host else host
    out.print(f"  studio http://{shown}:{port}  (Ctrl-C ends it)", highlight=False, soft_wrap=True)
    serve(app, host, port)
