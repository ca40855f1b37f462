"""`polylens train`: train the top layers against subspaces found before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polylens import distributed
from polylens.cli import options
from polylens.cli.console import ProgressBars, err, out, print_json
from polylens.config import DEFAULT_MODEL, PRESETS, TrainSettings, check
from polylens.corpora import read_parallel
from polylens.execution import open_model
from polylens.steps import train as train_step
from polylens.subspaces import Subspaces


def train(
    subspaces: Annotated[
        Path, typer.Argument(help="The subspaces.safetensors that `polylens probe` wrote.")
    ],
    corpus: Annotated[
        str, typer.Argument(help="Parallel prompts: a file, a folder, a Hub id, or 'starter'.")
    ] = "starter",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Training setting, e.g. -s epochs=3.", show_default=False),
    ] = None,
    out_file: Annotated[Path, typer.Option("--out", "-o", help="The delta to write.")] = Path(
        "runs/delta.safetensors"
    ),
    model: options.Model = None,
    revision: options.Revision = None,
    template: options.Template = None,
    seed: options.Seed = None,
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
    """Train the top layers on parallel prompts, against subspaces of the same model.

    **Examples**

        polylens train runs/probe/subspaces.safetensors

        polylens train subspaces.safetensors prompts.jsonl -s learning_rate=3e-5 -s epochs=3
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
    _, given = options.split_arguments(settings)
    chosen = check(TrainSettings, {**PRESETS["default"]["train"], **given})
    languages = Subspaces.load(subspaces)
    targets = [k for k in languages.languages if k != languages.central]
    parallel = read_parallel(corpus, (languages.central, *targets), offline=offline)
    train_rows = parallel.split(0)[0] if parallel.n_heldout else parallel
    with ProgressBars(shown=not quiet) as progress:
        loaded, execution = open_model(
            model or DEFAULT_MODEL,
            runtime,
            revision=revision,
            train=[chosen],
            with_head=chosen.reads_logits,
            progress=progress,
        )
        if not quiet:
            err.print(execution.sentence(), highlight=False, markup=False)
        delta = train_step(
            loaded,
            Subspaces.load(subspaces, fingerprint=loaded.fingerprint),
            train_rows.limit(chosen.rows, seed or 0),
            settings=chosen,
            template=template or "auto",
            seed=seed or 0,
            token_budget=runtime.token_budget,
            scratch=execution.scratch(),
            progress=progress,
        )
    if distributed.is_first():
        delta.save(out_file)
    log = delta.metadata["log"]
    if as_json:
        print_json({"out": str(out_file), "log": log})
        return
    first, last = log[0]["loss"], log[-1]["loss"]
    out.print(
        f"{len(log)} steps on {delta.metadata['n_rows']} rows; loss {first:.4f} → {last:.4f}",
        highlight=False,
    )
    out.print(f"\n  delta {out_file}", highlight=False, soft_wrap=True)
