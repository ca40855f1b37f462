"""`polylens models`: the models that come from the package registry."""

from __future__ import annotations

from typing import Annotated

import typer

from polylens.cli import options
from polylens.cli.console import ProgressBars, out, print_json, size, table
from polylens.errors import ModelError, nearest
from polylens.models.fetch import fetch as fetch_model
from polylens.models.fetch import is_cached, model_folder
from polylens.models.registry import REGISTRY

app = typer.Typer(
    help="List the models that come from the package registry, and fetch them.",
    invoke_without_command=True,
)


@app.callback()
def list_models(context: typer.Context, as_json: options.AsJson = False) -> None:
    """List the models of the registry; any folder, GGUF file or Hub id works too.

    **Examples**

        polylens models

        polylens models fetch smollm2-135m-instruct
    """
    if context.invoked_subcommand is not None:
        return
    rows = [
        {
            "name": model.name,
            "download_bytes": model.size_bytes,
            "license": model.license,
            "cached": is_cached(model_folder(model)),
            "description": model.description,
        }
        for model in REGISTRY.values()
    ]
    if as_json:
        print_json(rows)
        return
    table(
        None,
        ["model", "download", "licence", "cached", "what"],
        [
            [
                str(row["name"]),
                size(model.size_bytes),
                str(row["license"]),
                "yes" if row["cached"] else "no",
                str(row["description"]),
            ]
            for row, model in zip(rows, REGISTRY.values(), strict=True)
        ],
    )


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="Models of the registry.")],
    offline: options.Offline = False,
    quiet: options.Quiet = False,
) -> None:
    """Download and convert models, once.

    **Example**

        polylens models fetch qwen2.5-coder-1.5b-instruct
    """
    for name in names:
        if name not in REGISTRY:
            raise ModelError(
                f"a model to fetch must be one of {', '.join(REGISTRY)}, got {name!r}"
                f"{nearest(name, REGISTRY)}"
            )
    for name in names:
        with ProgressBars(shown=not quiet) as progress:
            folder = fetch_model(REGISTRY[name], offline=offline, progress=progress)
        out.print(f"  {name} {folder}", highlight=False, soft_wrap=True)
