"""`polylens mt-bench` and `polylens judge`: answers to open questions, and what a judge finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from polylens import distributed
from polylens.artefacts import write_json
from polylens.cli import options
from polylens.cli.console import ProgressBars, err, out, print_json, table
from polylens.errors import UsageError, nearest
from polylens.evaluation.judge import (
    Grade,
    JudgeSummary,
    Preference,
    Usage,
    judge_answers,
)
from polylens.evaluation.judgements import Judge
from polylens.evaluation.measures import Measure
from polylens.evaluation.mt_bench import answer_sides, read_conversations, read_questions
from polylens.evaluation.sides import choose_sides, template_of
from polylens.evaluation.verdicts import PAIRWISE, SINGLE, Mode
from polylens.locks import alone_in

_MODES: dict[str, tuple[Mode, ...]] = {
    "single": (SINGLE,),
    "pairwise": (PAIRWISE,),
    "both": (SINGLE, PAIRWISE),
}

# Unreadable judgements that are named.
_SHOWN = 8


def mt_bench(
    target: Annotated[
        str, typer.Argument(help="A run's folder, a delta.safetensors, or any model.")
    ],
    questions: Annotated[
        Path, typer.Option(help="JSONL with question_id, category and two turns a line.")
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="Model that answers too; for a run its own, for a delta too if it has one from "
            "the registry or the Hub.",
            show_default=False,
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            "--language",
            "-l",
            help="Language of questions that state none; by default it is detected.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Strength dial.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer of a turn, in tokens.")
    ] = 512,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Ask only so many questions.", show_default=False),
    ] = None,
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the answers; finished ones are kept.")
    ] = Path("runs/mt-bench"),
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
    """Let a model, or one before and after, answer open questions of two turns.

    `polylens judge` has the answers graded. Run the same command again to go on after an
    interruption.

    **Examples**

        polylens mt-bench runs/first --questions mt_bench_zh.jsonl --out runs/mt-bench

        polylens mt-bench my/model --against their/model --questions mt_bench_en.jsonl --limit 8
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
    if strength is not None and not 0 <= strength < math.inf:
        raise UsageError(f"--strength must be at least 0, got {strength}")
    found = read_questions(questions, language)
    sides = choose_sides(target, against, None if strength is None else [strength])

    def tell(line: str) -> None:
        if not quiet:
            err.print(line, highlight=False, markup=False)

    with ProgressBars(shown=not quiet) as progress:
        paths = answer_sides(
            sides,
            found,
            out_folder,
            runtime,
            limit=limit,
            template=template or template_of(target),
            max_new_tokens=max_new_tokens,
            progress=progress,
            on_execution=lambda execution: tell(execution.sentence()),
        )
    if not distributed.is_first():
        return
    if as_json:
        print_json({side.label: str(path) for side, path in zip(sides, paths, strict=True)})
        return
    for side, path in zip(sides, paths, strict=True):
        n_answered = len(read_conversations(path))
        out.print(
            f"  {side.label:<7}{path} ({n_answered} questions)", highlight=False, soft_wrap=True
        )
    out.print(
        f"\nHave them graded: polylens judge {' '.join(map(str, paths))} --endpoint URL "
        "--judge MODEL",
        highlight=False,
        soft_wrap=True,
    )


def judge(
    before: Annotated[Path, typer.Argument(help="Answers of `polylens mt-bench`.")],
    endpoint: Annotated[
        str,
        typer.Option(
            help="Base URL of an OpenAI-compatible server, e.g. http://localhost:8000/v1; a key is "
            "taken from OPENAI_API_KEY."
        ),
    ],
    judge_model: Annotated[str, typer.Option("--judge", help="The judge's name there.")],
    after: Annotated[
        Path | None,
        typer.Argument(help="Another model's, to the same questions.", show_default=False),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(help="single: grade answers; pairwise: compare them in both orders; or both."),
    ] = "both",
    parallel: Annotated[int, typer.Option(help="Requests at a time.")] = 4,
    retries: Annotated[
        int, typer.Option(help="Times a request is sent again after 429, 5xx or a timeout.")
    ] = 5,
    timeout: Annotated[float, typer.Option(help="Longest wait for a judgement, in seconds.")] = 600,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest judgement, in tokens.")] = 2048,
    price_in: Annotated[
        float | None,
        typer.Option(
            help="Price of a million prompt tokens, to show the cost.", show_default=False
        ),
    ] = None,
    price_out: Annotated[
        float | None,
        typer.Option(help="Price of a million tokens of judgements.", show_default=False),
    ] = None,
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the judgements; none is asked twice.")
    ] = Path("runs/judge"),
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Have answers graded from 1 to 10, and compared, by any OpenAI-compatible model.

    Every figure has its 95 % interval. A win counts only if both orders agree. Each judgement is
    kept as it arrives; run the same command again to go on after an interruption.

    **Examples**

        polylens judge before.jsonl after.jsonl --endpoint https://api.openai.com/v1 --judge gpt-4.1

        polylens judge after.jsonl --endpoint http://localhost:8000/v1 --judge my/model --parallel 1
    """
    if mode not in _MODES:
        raise UsageError(f"--mode must be {', '.join(_MODES)}, got {mode!r}{nearest(mode, _MODES)}")
    settings = Judge(
        endpoint=endpoint,
        model=judge_model,
        parallel=parallel,
        max_retries=retries,
        timeout_seconds=timeout,
        input_price=price_in,
        output_price=price_out,
        max_tokens=max_tokens,
    )
    answers = read_conversations(before)
    others = None if after is None else read_conversations(after)
    judgements = out_folder / "judgements.jsonl"
    with alone_in(out_folder), ProgressBars(shown=not quiet) as progress:
        summary = judge_answers(
            settings, answers, others, judgements, modes=_MODES[mode], progress=progress
        )
    write_json(out_folder / "summary.json", summary.to_dict())
    if as_json:
        print_json(summary.to_dict())
        return
    _show(summary)
    out.print(f"\n  judgements {judgements}", highlight=False, soft_wrap=True)
    out.print(f"  summary    {out_folder / 'summary.json'}", highlight=False, soft_wrap=True)


def _show(summary: JudgeSummary) -> None:
    """Print grades, preferences, and what they cost."""
    if summary.changes:
        _print_changes(summary.judge, summary.changes)
    elif summary.grades:
        _print_grades(summary.judge, summary.grades)
    if summary.preferences:
        if summary.grades:
            out.print()
        _print_preferences(summary.judge, summary.preferences)
    sentences = []
    if summary.preferences:
        sentences.append(
            f"Both orders agree on {summary.n_agreeing} of {summary.n_pairs} pairs"
            + (f"; {summary.n_identical} more are identical." if summary.n_identical else ".")
        )
    if summary.unreadable:
        shown = "; ".join(summary.unreadable[:_SHOWN])
        more = "" if len(summary.unreadable) <= _SHOWN else "; …, all in the summary"
        sentences.append(
            f"{len(summary.unreadable)} judgements are unreadable and count nowhere: {shown}{more}."
        )
    sentences.append(f"All judgements: {_usage(summary.total)}.")
    sentences.append(f"Of these now: {_usage(summary.now)}.")
    out.print("\n" + "\n".join(sentences), highlight=False, markup=False, soft_wrap=True)


def _print_grades(judge_model: str, grades: Sequence[Grade]) -> None:
    rows = [
        [one.group, str(one.n), f"{one.mean:.2f}", f"{one.low:.2f} to {one.high:.2f}"]
        for one in grades
    ]
    table(f"Grades of {judge_model}, 1 to 10 ↑", ["answers", "n", "mean", "95 % interval"], rows)


def _print_changes(judge_model: str, changes: Sequence[Measure]) -> None:
    rows = []
    for one in changes:
        change = one.change
        rows.append(
            [
                one.task.name,
                str(change.n),
                f"{change.before:.2f} ({one.before_interval[0]:.2f} to "
                f"{one.before_interval[1]:.2f})",
                f"{change.after:.2f} ({one.after_interval[0]:.2f} to {one.after_interval[1]:.2f})",
                f"{change.difference:+.2f} ({change.low:+.2f} to {change.high:+.2f})",
                f"{one.p_corrected:.2g}",
            ]
        )
    columns = ["answers", "n", "before", "after", "difference", "p, corrected"]
    table(f"Grades of {judge_model}, 1 to 10 ↑", columns, rows)


def _print_preferences(judge_model: str, preferences: Sequence[Preference]) -> None:
    rows = [
        [
            one.group,
            str(one.wins),
            str(one.ties),
            str(one.losses),
            f"{one.rates.difference:+.2f} ({one.rates.low:+.2f} to {one.rates.high:+.2f})",
            f"{one.p_corrected:.2g}",
        ]
        for one in preferences
    ]
    columns = ["answers", "wins", "ties", "losses", "win rate - loss rate", "p, corrected"]
    table(f"After against before, by {judge_model}", columns, rows)


def _usage(usage: Usage) -> str:
    cost = "" if usage.cost is None else f", cost {usage.cost:.4f}"
    return (
        f"{usage.requests} requests, {usage.input_tokens} tokens in, {usage.output_tokens} "
        f"out{cost}"
    )
