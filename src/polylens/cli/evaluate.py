"""`polylens evaluate` and `polylens compare`: any model, or two, with intervals and a gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from polylens import distributed
from polylens.artefacts import write_json, write_text
from polylens.cli import options
from polylens.cli.console import ProgressBars, err, out, print_json, table
from polylens.config import GateSettings, check
from polylens.corpora import read_parallel, starter_corpus
from polylens.errors import UsageError
from polylens.evaluation.choices import CHOICES
from polylens.evaluation.gate import Verdict, check_gate
from polylens.evaluation.measures import Measure, Scorecard, compare_scorecards
from polylens.evaluation.sides import BEFORE, Protocol, choose_sides, evaluate_sides, template_of
from polylens.evaluation.suite import BUILT_IN
from polylens.evaluation.tasks import choose_tasks, list_tasks
from polylens.languages import normalize_language, normalize_languages
from polylens.report import render_comparison


def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(
            help="A run's folder, a delta.safetensors, or any model.", show_default=False
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Model to compare with; a run is compared with its own, a delta too if it has one "
            "from the registry or the Hub.",
            show_default=False,
        ),
    ] = None,
    languages: Annotated[
        str,
        typer.Option("--languages", "-l", help="Languages besides the central one, by commas."),
    ] = "zh,sw",
    central: Annotated[str, typer.Option(help="The language to protect.")] = "en",
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks", "-t", help="What to measure, by commas; --list-tasks shows what there is."
        ),
    ] = ",".join(BUILT_IN),
    list_them: Annotated[
        bool, typer.Option("--list-tasks", help="Show what can be measured, and end.")
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with local copies of benchmarks.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Use only so many examples of a benchmark.", show_default=False),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask lm-eval's own tasks through the chat template.")
    ] = False,
    strength: Annotated[
        str | None,
        typer.Option(help="Strength dial, one or more by commas.", show_default=False),
    ] = None,
    corpus: Annotated[
        str, typer.Option(help="Held-out parallel prompts; 'starter' takes its held-out rows.")
    ] = "starter",
    rows: Annotated[int, typer.Option(min=2, help="Use at most so many of those.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 48,
    repetition_penalty: Annotated[
        float,
        typer.Option(min=1, help="Of answers, as many models are shipped with one; 1 is none."),
    ] = 1.0,
    margin: Annotated[
        float, typer.Option(help="Loss of accuracy that the gate tolerates; 0.01 is a point.")
    ] = 0.01,
    gate: Annotated[
        bool, typer.Option(help="End with exit code 3 if harm cannot be ruled out.")
    ] = True,
    log_samples: Annotated[
        bool, typer.Option(help="Keep prompts and responses of every example.")
    ] = True,
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the answers; finished ones are kept.")
    ] = Path("runs/evaluation"),
    template: options.TemplateOfRun = None,
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
    """Measure a model, or one against another: benchmarks, texts, choices, answers, retrieval.

    Every figure has its 95 % interval. With a base, differences are paired, and the gate tells
    whether the central language, or texts of the others, were harmed: exit code 3 if that cannot be
    ruled out. Run the same command again to go on after an interruption.

    **Examples**

        polylens evaluate runs/first --languages sw,bn

        polylens evaluate runs/first -t xcopa,xcopa_letters --data-dir DATA -l sw --strength 0.5,1

        polylens evaluate my/model --against their/model -t belebele -l sw
    """
    if list_them:
        _print_tasks()
        return
    if target is None:
        raise UsageError("a run, a delta or a model must be given; see polylens evaluate --help")
    runtime = options.make_runtime(
        device=device,
        dtype=dtype,
        memory=memory,
        token_budget=token_budget,
        deterministic=deterministic,
        offline=offline,
        trust_remote_code=trust_remote_code,
    )
    settings = check(GateSettings, {"margin": margin})
    protocol = _protocol(
        central, languages, tasks, corpus, rows, limit, data_dir, chat,
        template or template_of(target), max_new_tokens, repetition_penalty, log_samples, offline,
    )  # fmt: skip
    sides = choose_sides(target, against, _numbers(strength))

    def tell(line: str) -> None:
        if not quiet:
            err.print(line, highlight=False, markup=False)

    with ProgressBars(shown=not quiet) as progress:
        cards = evaluate_sides(
            sides,
            protocol,
            out_folder,
            runtime,
            progress=progress,
            on_execution=lambda execution: tell(execution.sentence()),
            on_part=lambda part: tell(f"  {part}"),
        )
    if not distributed.is_first():
        return
    if sides[0].label != BEFORE:
        _show_single(cards[0], as_json)
        return
    found = {
        side.label: compare_scorecards(cards[0], card)
        for side, card in zip(sides[1:], cards[1:], strict=True)
    }
    verdicts = {
        side.label: check_gate(
            pairs_of(cards[0], card), [protocol.central], settings, texts_of=protocol.languages
        )
        for side, card in zip(sides[1:], cards[1:], strict=True)
    }
    strengths = {side.label: side.strength for side in sides[1:]}
    _show(
        f"{target} against {sides[0].model}",
        found,
        verdicts,
        strengths,
        out_folder,
        protocol.central,
        as_json,
    )
    failed = [v for v in verdicts.values() if v is not None and not v.holds]
    if gate and len(failed) == len(verdicts):  # of several strengths, one that holds is enough
        failed[0].require()


def compare(
    before: Annotated[Path, typer.Argument(help="Folder of answers of one model.")],
    after: Annotated[Path, typer.Argument(help="And of the other.")],
    central: Annotated[str, typer.Option(help="The language to protect.")] = "en",
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the summary and the page.")
    ] = Path("runs/comparison"),
    as_json: options.AsJson = False,
) -> None:
    """Compare two models by the answers that `polylens evaluate` kept of each; print and draw.

    **Example**

        polylens compare runs/evaluation/before runs/other/after
    """
    cards = [_scorecard(folder) for folder in (before, after)]
    found = {"after": compare_scorecards(*cards)}
    language = normalize_language(central)
    verdict = check_gate(pairs_of(*cards), [language], GateSettings())
    _show(f"{after} against {before}", found, {"after": verdict}, {}, out_folder, language, as_json)


def _scorecard(folder: Path) -> Scorecard:
    """Find the answers in a folder: its own, or those of the only model in it."""
    for candidate in (folder, folder / "after"):
        if Scorecard(candidate).path.is_file():
            return Scorecard(candidate)
    raise UsageError(
        f"a folder of answers must hold scorecard.json, but {folder} does not; make one with "
        "`polylens evaluate MODEL --out FOLDER`"
    )


def pairs_of(before: Scorecard, after: Scorecard) -> list[Any]:
    """Return the tasks that both have, with their examples."""
    return [
        (task, before.examples(name), after.examples(name))
        for name, task in before.tasks.items()
        if name in after.tasks
    ]


def _protocol(
    central: str,
    languages: str,
    tasks: str,
    corpus: str,
    rows: int,
    limit: int | None,
    data_dir: Path | None,
    chat: bool,
    template: str,
    max_new_tokens: int,
    repetition_penalty: float,
    with_samples: bool,
    offline: bool,
) -> Protocol:
    centre = normalize_language(central)
    others = tuple(k for k in normalize_languages(languages.split(",")) if k != centre)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    built_in = tuple(name for name in BUILT_IN if name in names)
    others_named = [name for name in names if name not in BUILT_IN]
    benchmarks = choose_tasks(others_named, (centre, *others), data_dir, chat=chat)
    if built_in and not others:
        raise UsageError(
            f"{', '.join(built_in)} must have a language besides {centre}; name some by --languages"
        )
    if built_in == (CHOICES,) and not benchmarks and centre not in starter_corpus().languages:
        raise UsageError(
            f"{CHOICES} must be in a language of the starter corpus "
            f"({', '.join(starter_corpus().languages)}), got {centre}; add another task"
        )
    everything = (centre, *others) if built_in else (centre,)
    found = read_parallel(corpus, everything, offline=offline)
    found = found.split(rows)[1] if found.n_heldout else found.limit(rows)
    return Protocol(
        rows=found,
        central=centre,
        languages=others if built_in else (),
        built_in=built_in,
        benchmarks=tuple(benchmarks),
        limit=limit,
        data_dir=data_dir,
        template=template,
        max_new_tokens=max_new_tokens,
        with_samples=with_samples,
        repetition_penalty=repetition_penalty,
    )


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    numbers = options.numbers("--strength", text)
    if any(not 0 <= number < float("inf") for number in numbers):
        raise UsageError(f"--strength must be at least 0, got {text!r}")
    return numbers


def _print_tasks() -> None:
    built_in = {
        "bits_per_byte": "likelihood of held-out texts",
        "choices": "the right one of two answers, by its letter, in the central language",
        "fidelity": "answers in the language of the question",
        "retrieval": "translations that are nearest neighbours, by layer",
    }
    table(None, ["task", "what it measures"], [*built_in.items(), *list_tasks()])
    out.print("and every task that lm-eval has: `lm-eval ls tasks`", highlight=False)


def _show_single(card: Scorecard, as_json: bool) -> None:
    figures = card.figures()
    if as_json:
        print_json(
            [
                {**dataclasses.asdict(task), "n": n, "mean": mean, "low": low, "high": high}
                for task, n, mean, low, high in figures
            ]
        )
        return
    rows = [
        [task.name, task.metric, str(n), f"{mean:.3f}", f"{low:.3f} to {high:.3f}"]
        for task, n, mean, low, high in figures
    ]
    table(None, ["task", "metric", "n", "mean", "95 % interval"], rows)
    out.print(f"\n  answers {card.folder}", highlight=False, soft_wrap=True)


def _show(
    title: str,
    found: dict[str, list[Measure]],
    verdicts: dict[str, Verdict | None],
    strengths: dict[str, float],
    folder: Path,
    central: str,
    as_json: bool,
) -> None:
    """Print, write and draw what was compared."""
    summary = {
        "central": central,
        "measures": {k: [dataclasses.asdict(one) for one in v] for k, v in found.items()},
        "gate": {
            k: None if v is None else {**dataclasses.asdict(v), "holds": v.holds}
            for k, v in verdicts.items()
        },
        "strengths": strengths,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", summary)
    page = folder / "comparison.html"
    write_text(page, render_comparison(title, found, verdicts, strengths, central))
    if as_json:
        print_json(summary)
        return
    for label, measures in found.items():
        print_measures(None if len(found) == 1 else label, measures)
        verdict = verdicts[label]
        sentence = "Gate: nothing to tell by." if verdict is None else verdict.sentence()
        out.print(f"\n{sentence}\n", highlight=False, soft_wrap=True)
    out.print(f"  summary {folder / 'summary.json'}", highlight=False, soft_wrap=True)
    out.print(f"  page    {page}", highlight=False, soft_wrap=True)


def print_measures(title: str | None, measures: Sequence[Measure]) -> None:
    """Print figures before and after, each with its interval."""
    rows = []
    for one in measures:
        change = one.change
        arrow = "↑" if one.task.higher_is_better else "↓"
        rows.append(
            [
                f"{one.task.name} {arrow}",
                str(change.n),
                _with_interval(change.before, one.before_interval),
                _with_interval(change.after, one.after_interval),
                _with_interval(change.difference, (change.low, change.high), "+"),
                f"{one.p_corrected:.2g}",
                f"{change.detectable:.3f}",
            ]
        )
    columns = ["task", "n", "before", "after", "difference", "p, corrected", "detectable"]
    table(title, columns, rows)


def _with_interval(value: float, interval: tuple[float, float], sign: str = "") -> str:
    low, high = interval
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
