"""`polylens probe`: where a model keeps its languages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polylens import distributed
from polylens.artefacts import write_text
from polylens.cli import options
from polylens.cli.console import ProgressBars, err, out, print_json, table
from polylens.config import DEFAULT_MODEL, ProbeSettings, check
from polylens.corpora import read_texts
from polylens.execution import open_model
from polylens.languages import normalize_language, normalize_languages
from polylens.report import render_probe_page
from polylens.steps import probe as probe_step
from polylens.subspaces import Subspaces


def probe(
    corpus: Annotated[
        str, typer.Argument(help="Texts per language: a file, a folder, a Hub id, or 'starter'.")
    ] = "starter",
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for subspaces.safetensors and probe.html.")
    ] = Path("runs/probe"),
    model: options.Model = None,
    revision: options.Revision = None,
    languages: options.Languages = None,
    central: options.Central = None,
    template: options.Template = None,
    rank: Annotated[
        int | None,
        typer.Option(help=str(ProbeSettings.model_fields["rank"].description), show_default=False),
    ] = None,
    agnostic: Annotated[
        str, typer.Option(help=str(ProbeSettings.model_fields["agnostic"].description))
    ] = "mean",
    pooling: Annotated[
        str, typer.Option(help=str(ProbeSettings.model_fields["pooling"].description))
    ] = "last",
    max_tokens: Annotated[
        int, typer.Option(help=str(ProbeSettings.model_fields["max_tokens"].description))
    ] = 64,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    token_budget: options.TokenBudget = None,
    deterministic: options.Deterministic = False,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Find the language subspaces of every layer, print them and draw them.

    **Examples**

        polylens probe --languages en,sw,bn

        polylens probe texts.jsonl --model my/folder --central en --out runs/probe
    """
    runtime = options.make_runtime(
        device=device,
        dtype=dtype,
        memory=memory,
        token_budget=token_budget,
        deterministic=deterministic,
        offline=offline,
        trust_remote_code=trust_remote_code,
    )
    settings = check(
        ProbeSettings,
        {"rank": rank, "agnostic": agnostic, "pooling": pooling, "max_tokens": max_tokens},
    )
    centre = normalize_language(central or "en")
    wanted = normalize_languages(languages.split(",")) if languages else None
    if wanted is not None and centre not in wanted:
        wanted = (centre, *wanted)
    texts = read_texts(corpus, wanted or (centre,), offline=offline)
    with ProgressBars(shown=not quiet) as progress:
        loaded, execution = open_model(
            model or DEFAULT_MODEL,
            runtime,
            revision=revision,
            progress=progress,
        )
        if not quiet:
            err.print(execution.sentence(), highlight=False, markup=False)
        subspaces = probe_step(
            loaded,
            texts,
            languages=wanted,
            central=centre,
            settings=settings,
            template=template or "auto",
            token_budget=runtime.token_budget,
            scratch=execution.scratch(),
            progress=progress,
        )
    path, page = out_folder / "subspaces.safetensors", out_folder / "probe.html"
    if distributed.is_first():
        subspaces.save(path)
        write_text(page, render_probe_page(subspaces))
    if as_json:
        print_json(_as_rows(subspaces))
        return
    _print(subspaces)
    out.print(f"\n  subspaces {path}\n  picture   {page}", highlight=False, soft_wrap=True)


def _as_rows(subspaces: Subspaces) -> list[dict[str, object]]:
    targets = [k for k in subspaces.languages if k != subspaces.central]
    rows = []
    for index, layer in enumerate(subspaces.layers):
        distances = {k: subspaces.distances(k, layer) for k in targets}
        rows.append(
            {
                "layer": layer,
                "after_final_norm": layer == subspaces.metadata["n_layers"],
                "separability": float(subspaces.separability[index]),
                "singular_values": subspaces.singular_values[index].tolist(),
                "distance_agnostic": {k: pair[0] for k, pair in distances.items()},
                "distance_specific": {k: pair[1] for k, pair in distances.items()},
            }
        )
    return rows


def _print(subspaces: Subspaces) -> None:
    targets = [k for k in subspaces.languages if k != subspaces.central]
    rows = []
    for index, layer in enumerate(subspaces.layers):
        distances = [subspaces.distances(k, layer) for k in targets]
        last = layer == subspaces.metadata["n_layers"]
        rows.append(
            [
                "norm" if last else str(layer),
                f"{subspaces.separability[index]:.0%}",
                " ".join(f"{value:.3g}" for value in subspaces.singular_values[index].tolist()),
                *(f"{agnostic:.3f} {specific:.3f}" for agnostic, specific in distances),
            ]
        )
    table(
        f"Distance to {subspaces.central} in the agnostic and the specific subspace, by layer",
        ["layer", "separable", "singular values", *targets],
        rows,
    )
