"""`polylens enhance`: the main job."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from polylens import distributed, hub
from polylens.artefacts import read_text
from polylens.cli import options
from polylens.cli.console import (
    ProgressBars,
    ProgressLines,
    duration,
    err,
    out,
    print_json,
    size,
    table,
)
from polylens.config import load_config
from polylens.evaluation import Evaluation
from polylens.languages import language_name
from polylens.plan import Plan
from polylens.run import RunResult
from polylens.run import enhance as enhance_run
from polylens.run_folder import STAGES
from polylens.shortfall import push_sentence

STAGE_TITLES = {
    "probe": "Probing the language subspaces",
    "train": "Training the top layers",
    "gate": "Choosing the strength that does no harm",
    "answers-before": "Answering held-out prompts, before",
    "answers-after": "Answering held-out prompts, after",
    "states": "Comparing states and bits per byte",
    "model": "Saving the model",
    "report": "Writing the report",
}


def enhance(
    arguments: options.ConfigAndOverrides = None,
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the run; made if it is not there.")
    ] = Path("runs/enhance"),
    model: options.Model = None,
    revision: options.Revision = None,
    languages: options.Languages = None,
    central: options.Central = None,
    preset: options.Preset = None,
    probe_data: Annotated[
        str | None, typer.Option(help="Texts per language, for probing.", show_default=False)
    ] = None,
    train_data: Annotated[
        str | None, typer.Option(help="Parallel prompts, for training.", show_default=False)
    ] = None,
    heldout_data: Annotated[
        str | None, typer.Option(help="Held-out parallel prompts.", show_default=False)
    ] = None,
    template: options.Template = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    token_budget: options.TokenBudget = None,
    deterministic: options.Deterministic = False,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME", help="Upload the model when it is done.", show_default=False
        ),
    ] = None,
    quiet: options.Quiet = False,
    progress_lines: Annotated[
        bool,
        typer.Option(
            "--progress-lines",
            help="Progress as a line of JSON at a time, on stderr, for programs.",
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a model better in some languages: probe, train, save, prove, report.

    Run the same command again to go on after an interruption.

    **Examples**

        polylens enhance --languages sw,bn --out runs/first

        polylens enhance -m my/folder -l Swahili --train-data prompts.jsonl --out runs/sw

        polylens enhance examples/laptop.yaml train.epochs=3 --out runs/laptop
    """
    path, overrides = options.split_arguments(arguments)
    flags: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "languages": languages,
        "central": central,
        "preset": preset,
        "template": template,
        "seed": seed,
        "probe.corpus": probe_data,
        "train.corpus": train_data,
        "evaluate.corpus": heldout_data,
    }
    overrides.update({key: value for key, value in flags.items() if value is not None})
    config = load_config(path, overrides)
    runtime = options.make_runtime(
        device=device,
        dtype=dtype,
        memory=memory,
        token_budget=token_budget,
        deterministic=deterministic,
        offline=offline,
        trust_remote_code=trust_remote_code,
    )
    if push_to_hub is not None:
        hub.check_target(push_to_hub)
    started = time.monotonic()

    bars = ProgressLines() if progress_lines else ProgressBars(shown=not quiet)

    def announce(stage: str) -> None:
        if isinstance(bars, ProgressLines):
            bars.stage(stage)
        elif not quiet:
            err.print(
                f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {STAGE_TITLES[stage]}",
                highlight=False,
                markup=False,
            )

    def explain(plan: Plan) -> None:
        if not quiet and not progress_lines:
            err.print(plan.execution.sentence(), highlight=False, markup=False)

    with bars as progress:
        result = enhance_run(
            config,
            out_folder,
            runtime=runtime,
            given=read_text(path) if path else None,
            progress=progress,
            on_plan=explain,
            on_stage=announce,
        )
    address = None
    if push_to_hub and distributed.is_first() and result.dial.holds:
        address = hub.push_model(result.folder.model, push_to_hub)
    if as_json:
        values = {"out": str(out_folder), "gate": result.dial.to_dict()}
        print_json({**values, **result.evaluation.to_dict()})
        result.dial.require()
        return
    print_evaluation(result.evaluation)
    taken = result.folder.journal.finished("train")
    assert taken is not None  # the run is finished
    trained = config.train.model_copy(update={"strength": taken["strength"]})
    if pushed := push_sentence(trained, config.languages):
        out.print(f"\n{pushed}", highlight=False, soft_wrap=True)
    out.print(f"\n{result.dial.sentence()}", highlight=False, soft_wrap=True)
    _print_end(result, time.monotonic() - started)
    if address is not None:
        out.print(f"  pushed   {address}", highlight=False, soft_wrap=True)
    result.dial.require()


EVALUATION_COLUMNS = (
    "language",
    "answers in it ↑",
    "p",
    "repeating ↓",
    "bits per byte ↓",
    "change, 95 %",
    "states moved",
    "KL, bits",
)


def print_evaluation(evaluation: Evaluation) -> None:
    """Print before and after, central language first."""
    table(None, EVALUATION_COLUMNS, evaluation_rows(evaluation))


def evaluation_rows(evaluation: Evaluation) -> list[list[str]]:
    """Return a row a language, central language first, under `EVALUATION_COLUMNS`."""
    by_name = {one.task.name: one for one in evaluation.measures}
    rows = []
    for language in evaluation.all_languages:
        fidelity = evaluation.fidelity[language]
        bits = by_name[f"bits_per_byte_{language}"].change
        change = evaluation.state_change[language]
        rows.append(
            [
                f"{language_name(language)} ({language})",
                f"{fidelity.before.passed} → {fidelity.after.passed} of {fidelity.after.n}",
                f"{by_name[f'fidelity_{language}'].change.p_value:.2g}",
                f"{fidelity.before.repeating} → {fidelity.after.repeating}",
                f"{bits.before:.3f} → {bits.after:.3f}",
                f"{bits.low:+.3f} to {bits.high:+.3f}",
                f"{change.relative:.2%}",
                f"{change.kl_bits:.3f}",
            ]
        )
    return rows


def _print_end(result: RunResult, seconds: float) -> None:
    folder = result.folder
    entries = folder.journal.entries()
    if not result.done:
        out.print(f"\nNothing to do: {folder.path} was finished before.", highlight=False)
    else:
        peak = max(entry["peak_memory_bytes"] for entry in entries)
        out.print(f"\nDone in {duration(seconds)}, peak memory {size(peak)}.", highlight=False)
    for name, path in (
        *([("model", folder.model)] if result.dial.holds else []),
        ("delta", folder.delta),
        ("report", folder.report),
        ("answers", folder.evaluation),
    ):
        out.print(f"  {name:<8} {path}", highlight=False, soft_wrap=True)
