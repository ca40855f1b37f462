"""`polylens search`: the settings that help most, by measurement."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from polylens.cli import options
from polylens.cli.console import ProgressBars, duration, err, out, print_json, table
from polylens.config import load_config
from polylens.errors import GateError, UsageError
from polylens.plan import Plan
from polylens.search import STRENGTHS, SearchResult, Trial, read_space
from polylens.search import search as run_search

_STRENGTHS = ",".join(f"{strength:g}" for strength in STRENGTHS)


def search(
    arguments: options.ConfigAndOverrides = None,
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the search; made if it is not there.")
    ] = Path("runs/search"),
    model: options.Model = None,
    revision: options.Revision = None,
    languages: options.Languages = None,
    central: options.Central = None,
    preset: options.Preset = None,
    probe_data: Annotated[
        str | None, typer.Option(help="Texts per language, for probing.", show_default=False)
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(help="Parallel prompts, to train and to search on.", show_default=False),
    ] = None,
    heldout_data: Annotated[
        str | None, typer.Option(help="Parallel prompts to report on.", show_default=False)
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", "-t", help="Benchmarks to measure too, by commas.", show_default=False
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with local copies of benchmarks.", show_default=False),
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option(help="YAML file of what may vary; default: a space that ships with PolyLens."),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=RANGE",
            help="A setting that may vary, e.g. 'train.layers=[1, 2, 4]'; wins over --space, and "
            "without it only such settings vary.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Trials of the search, finished ones included.")
    ] = 30,
    strength: Annotated[
        str, typer.Option(help="Strengths of the dial at which each trial is measured, by commas.")
    ] = _STRENGTHS,
    development_rows: Annotated[
        int, typer.Option(min=2, help="Training rows set apart to compare trials on.")
    ] = 32,
    answers: Annotated[
        bool, typer.Option("--answers", help="Let trials answer prompts, too; costs most by far.")
    ] = False,
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
    """Find the settings that help the target languages most and leave the central one unharmed.

    The trunk runs once; each trial trains and measures a crown. Trials are compared on rows of
    their own, and what is chosen is measured once on rows that it was not chosen by. The best
    settings are written as `best.yaml`. Exit code 3 if the gate holds for none.

    Run the same command again to go on after an interruption, or several times at once to share
    the work.

    **Examples**

        polylens search --languages sw,bn --out runs/search

        polylens search -l sw --vary 'train.learning_rate={low: 1e-5, high: 1e-3, log: true}'

        polylens search run.yaml -t xcopa --data-dir DATA gate.margin=0.02 --trials 50

        polylens enhance runs/search/best.yaml --out runs/best
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
        "evaluate.tasks": tasks.split(",") if tasks else None,
        "evaluate.data_dir": str(data_dir) if data_dir else None,
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
    unexpected, ranges = options.split_arguments(vary)
    if unexpected is not None:
        raise UsageError(f"--vary must be KEY=RANGE, got {str(unexpected)!r}; see --space")
    chosen = read_space(config, space, ranges)
    started = time.monotonic()

    def tell(line: str) -> None:
        if not quiet:
            err.print(line, highlight=False, markup=False)

    def explain(plan: Plan) -> None:
        tell(plan.execution.sentence())
        tell(f"{trials} trials over {', '.join(chosen.dimensions)}")

    with ProgressBars(shown=not quiet) as progress:
        result = run_search(
            config,
            out_folder,
            space=chosen,
            n_trials=trials,
            strengths=_strengths(strength),
            n_development=development_rows,
            answers=answers,
            runtime=runtime,
            progress=progress,
            on_plan=explain,
            on_trial=lambda trial: tell(describe(trial)),
        )
    if as_json:
        print_json({"out": str(out_folder), "n_elsewhere": result.n_elsewhere, **result.to_dict()})
    elif result.n_elsewhere:
        out.print(
            f"{result.n_elsewhere} trials are still running in other processes; the last of them "
            "measures what was chosen.",
            highlight=False,
        )
    else:
        _show(result, time.monotonic() - started)
    if not result.n_elsewhere and not result.holds:
        best = result.best
        raise GateError(
            result.sentence()
            if best is None
            else f"The gate holds for the best settings where they were chosen, but not on the "
            f"report rows. {best.report.gate}"
        )


def describe(trial: Trial) -> str:
    """Say in one line what came of a trial."""
    seconds = duration(sum(trial.seconds.values()))
    start = f"  trial {trial.number} ({seconds}): "
    point = trial.best
    if trial.outcome != "measured":
        return f"{start}{trial.outcome}, {trial.reason}"
    if point is None:
        return f"{start}the gate fails at the lowest strength"
    return f"{start}gain {point.gain} % at strength {point.strength:g}"


def _strengths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--strength must be numbers by commas, e.g. 0.5,1, got {text!r}"
        ) from error


def _show(result: SearchResult, seconds: float) -> None:
    """Print the best settings against the default ones, and where everything is."""
    if result.best is not None:
        chosen = [("best", result.best)]
        if result.default is not None:
            chosen.insert(0, ("default", result.default))
        rows = [
            [key, *(json.dumps(one.settings[key]) for _, one in chosen)]
            for key in result.best.settings
        ]
        rows += [
            ["output.strength", *(f"{one.development.strength:g}" for _, one in chosen)],
            ["gain %, development rows", *(str(one.development.gain) for _, one in chosen)],
            ["gain %, report rows", *(str(one.report.gain) for _, one in chosen)],
            ["loss / allowed, report rows", *(f"{one.report.loss:.2f}" for _, one in chosen)],
            ["gate, report rows", *("holds" if o.report.holds else "fails" for _, o in chosen)],
        ]
        table(None, ["", *(name for name, _ in chosen)], rows)
        out.print()
    out.print(result.sentence(), highlight=False, soft_wrap=True)
    out.print(f"\nDone in {duration(seconds)}.", highlight=False)
    folder = result.folder
    shown = [("trials", folder.trials), ("front", folder.front), ("page", folder.page)]
    if result.best is not None:
        shown.insert(0, ("best", folder.best))
    for name, where in shown:
        out.print(f"  {name:<8} {where}", highlight=False, soft_wrap=True)
