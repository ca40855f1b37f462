"""`polylens evaluate`: a model before and after a delta, at any strength."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polylens import distributed
from polylens.artefacts import write_json
from polylens.cli import options
from polylens.cli.console import ProgressBars, err, out, print_json
from polylens.cli.run import print_evaluation
from polylens.config import DEFAULT_MODEL
from polylens.corpora import read_parallel
from polylens.crown import CrownDelta
from polylens.evaluation import evaluate as evaluate_step
from polylens.execution import open_model


def evaluate(
    delta: Annotated[
        Path, typer.Argument(help="The delta.safetensors of a run or of `polylens train`.")
    ],
    corpus: Annotated[
        str, typer.Argument(help="Held-out parallel prompts; 'starter' takes its held-out rows.")
    ] = "starter",
    model: options.Model = None,
    revision: options.Revision = None,
    strength: Annotated[
        float, typer.Option(help="Strength dial: 0 is the untouched model, 1 the trained one.")
    ] = 1.0,
    limit: Annotated[int, typer.Option(help="Use at most so many rows.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 48,
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the summary to this JSON file.")
    ] = None,
    template: options.Template = None,
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
    """Compare a model with itself under a delta: fidelity, bits per byte, change of states.

    **Examples**

        polylens evaluate runs/first/delta.safetensors

        polylens evaluate delta.safetensors heldout.jsonl --strength 0.5 --json
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
    found = CrownDelta.load(delta)
    central, targets = found.metadata["central"], found.metadata["languages"]
    rows = read_parallel(corpus, (central, *targets))
    rows = rows.split(limit)[1] if rows.n_heldout else rows.limit(limit)
    with ProgressBars(shown=not quiet) as progress:
        loaded, execution = open_model(
            model or DEFAULT_MODEL,
            runtime,
            revision=revision,
            with_head=True,
            progress=progress,
        )
        if not quiet:
            err.print(execution.sentence(), highlight=False, markup=False)
        result = evaluate_step(
            loaded,
            CrownDelta.load(delta, fingerprint=loaded.fingerprint),
            rows,
            languages=targets,
            central=central,
            strength=strength,
            max_new_tokens=max_new_tokens,
            template=template or "auto",
            token_budget=runtime.token_budget,
            scratch=execution.scratch(),
            progress=progress,
        )
    if out_file is not None and distributed.is_first():
        write_json(out_file, result.to_dict())
    if as_json:
        print_json(result.to_dict())
        return
    print_evaluation(result)
    if out_file is not None:
        out.print(f"\n  summary {out_file}", highlight=False, soft_wrap=True)
