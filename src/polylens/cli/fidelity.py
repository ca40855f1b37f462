"""`polylens fidelity`: which answers are in the language asked for, from a file of answers."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from polylens.artefacts import parse_json, read_text, write_json, write_text
from polylens.cli import options
from polylens.cli.console import out, print_json, table
from polylens.errors import CorpusError
from polylens.evaluation.language_confusion import (
    Confusion,
    Judgement,
    Rate,
    Setting,
    fasttext_detector,
    judge_answer,
    second_detector,
    summarise_confusion,
)
from polylens.evaluation.statistics import compare_paired, holm
from polylens.languages import language_name, normalize_language


@dataclass(frozen=True)
class _Row:
    """An answer, with the language that was asked for."""

    language: str
    prompt: str
    answer: str
    setting: Setting


def fidelity(
    answers: Annotated[
        Path, typer.Argument(help="JSONL with language and answer, or a folder of `evaluate`.")
    ],
    against: Annotated[
        Path | None,
        typer.Option(help="Answers of another model to the same prompts.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSONL or CSV with every prompt that must have been answered.", show_default=False
        ),
    ] = None,
    detector: Annotated[
        Path | None,
        typer.Option(help="Another fastText model, e.g. GlotLID's model.bin.", show_default=False),
    ] = None,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for summary and verdicts.", show_default=False),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Count answers in the language asked for, line by line and word by word.

    The rates are those of the Language Confusion Benchmark. A line of JSON holds `language` and
    `answer`, and if you like `prompt` and `setting` (monolingual or crosslingual).

    **Examples**

        polylens fidelity after.jsonl --against before.jsonl --out runs/fidelity

        polylens fidelity answers.jsonl --prompts monolingual/ar.csv --detector glotlid.bin
    """
    rows = _read(answers)
    if prompts is not None:
        _require_prompts(rows, answers, prompts)
    others = None if against is None else _read(against)
    if others is not None and list(map(_asked, others)) != list(map(_asked, rows)):
        raise CorpusError(
            f"both files must answer the same prompts in the same order, but {against} has "
            f"{len(others)} and {answers} {len(rows)}, or others; give answers to the same prompts"
        )
    detect = fasttext_detector(detector)
    second = second_detector([row.language for row in rows])

    def judge(found: Sequence[_Row]) -> list[Judgement]:
        return [judge_answer(r.language, r.answer, detect, second, r.setting) for r in found]

    judged = judge(rows)
    summary = summarise_confusion(judged)
    before = None if others is None else judge(others)
    result: dict[str, Any] = {"answers": [dataclasses.asdict(one) for one in summary]}
    if before is not None:
        result["against"] = [dataclasses.asdict(one) for one in summarise_confusion(before)]
        result["difference"] = _differences(before, judged)
    if out_folder is not None:
        out_folder.mkdir(parents=True, exist_ok=True)
        write_json(out_folder / "fidelity.json", result)
        verdicts = [
            {**dataclasses.asdict(row), **dataclasses.asdict(one)}
            for row, one in zip(rows, judged, strict=True)
        ]
        lines = [json.dumps(one, ensure_ascii=False) for one in verdicts]
        write_text(out_folder / "verdicts.jsonl", "".join(f"{line}\n" for line in lines))
    if as_json:
        print_json(result)
        return
    if before is not None:
        _print(str(against), summarise_confusion(before))
    _print(str(answers), summary)
    if before is not None:
        columns = ["line level, paired", "n", "before", "after", "difference", "p, corrected"]
        table(None, columns, [_difference_row(one) for one in result["difference"]])
    if out_folder is not None:
        out.print(f"\n  summary  {out_folder / 'fidelity.json'}", highlight=False, soft_wrap=True)
        out.print(f"  verdicts {out_folder / 'verdicts.jsonl'}", highlight=False, soft_wrap=True)


def _asked(row: _Row) -> tuple[str, str, str]:
    return row.language, row.setting, row.prompt


def _differences(before: Sequence[Judgement], after: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Line level, over the answers that could be judged on both sides."""
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for old, new in zip(before, after, strict=True):
        if old.line_passed is not None and new.line_passed is not None:
            key = (old.language, old.setting)
            pairs.setdefault(key, []).append((float(old.line_passed), float(new.line_passed)))
    found = {key: compare_paired(*zip(*values, strict=True)) for key, values in pairs.items()}
    corrected = holm([one.p_value for one in found.values()])
    return [
        {"language": key[0], "setting": key[1], **dataclasses.asdict(one), "p_corrected": p}
        for (key, one), p in zip(found.items(), corrected, strict=True)
    ]


def _read(path: Path) -> list[_Row]:
    """Read answers.

    Raises:
        CorpusError: a row is damaged or lacks something.
    """
    files = sorted(path.glob("fidelity_*.jsonl")) if path.is_dir() else [path]
    rows = []
    for file in files:
        lines = read_text(file).split("\n")
        rows += [
            _row(line, f"line {number} of {file}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not rows:
        raise CorpusError(
            f"a file of answers must hold one JSON object a line, but {path} is empty"
        )
    return rows


def _row(line: str, where: str) -> _Row:
    try:
        values = parse_json(line)
    except ValueError as error:
        raise CorpusError(
            f"{where} must be JSON, but is not ({error}); mend or delete it"
        ) from None
    if isinstance(values, dict) and isinstance(values.get("responses"), dict):  # of `evaluate`
        values = {**values, "language": values.get("target"), **values["responses"]}
    for key in ("language", "answer"):
        if not isinstance(values, dict) or not isinstance(values.get(key), str):
            raise CorpusError(
                f'{where} must hold {key!r} as text, e.g. {{"language": "sw", "answer": "…"}}, but '
                "does not; add it, with an empty answer if there was none"
            )
    setting = values.get("setting", "monolingual")
    if setting not in ("monolingual", "crosslingual"):
        raise CorpusError(
            f"setting must be monolingual or crosslingual, but {where} has {setting!r}"
        )
    prompt = str(values.get("prompt", values.get("id", "")))
    return _Row(normalize_language(values["language"]), prompt, values["answer"], setting)


def _require_prompts(rows: Sequence[_Row], answers: Path, prompts: Path) -> None:
    """Refuse answers of which some are missing."""
    content = read_text(prompts)
    try:
        if prompts.suffix == ".csv":
            wanted = [entry["prompt"] for entry in csv.DictReader(io.StringIO(content))]
        else:
            wanted = [parse_json(line)["prompt"] for line in content.split("\n") if line.strip()]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise CorpusError(
            f"{prompts} must hold a column 'prompt', but does not ({error})"
        ) from None
    there = {row.prompt for row in rows}
    missing = [prompt for prompt in wanted if prompt not in there]
    if missing:
        raise CorpusError(
            f"every prompt of {prompts} must have an answer, but {answers} lacks {len(missing)} of "
            f"{len(wanted)}, the first is {missing[0][:60]!r}; add them"
        )


def _print(title: str, summary: Sequence[Confusion]) -> None:
    """Print rates, then the language asked for against the language answered."""
    with_setting = len({one.setting for one in summary}) > 1
    rows = [
        [
            f"{language_name(one.language)} ({one.language})"
            + (f", {one.setting}" if with_setting else ""),
            str(one.n),
            _rate(one.line),
            _rate(one.word),
            "" if one.both is None else f"{one.both:.0%}",
            str(one.empty),
            str(one.too_short),
            str(one.mixed),
            str(one.repeating),
            _rate(one.disagree),
        ]
        for one in summary
    ]
    columns = [
        "language", "n", "lines pass ↑", "words pass ↑", "both ↑", "empty", "too short", "mixed",
        "repeating", "detectors disagree",
    ]  # fmt: skip
    table(title, columns, rows)
    answered = list(dict.fromkeys(k for one in summary for k in one.answered))
    counts = [
        [rows[number][0], *(str(one.answered.get(k, 0) or "") for k in answered)]
        for number, one in enumerate(summary)
    ]
    out.print()
    table("asked ↓, answered →", ["", *answered], counts)
    out.print()


def _rate(rate: Rate) -> str:
    if rate.rate is None:
        return "-"
    return f"{rate.rate:.0%} ({rate.low:.0%} to {rate.high:.0%}) of {rate.n}"


def _difference_row(one: dict[str, Any]) -> list[str]:
    return [
        one["language"],
        str(one["n"]),
        f"{one['before']:.3f}",
        f"{one['after']:.3f}",
        f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})",
        f"{one['p_corrected']:.2g}",
    ]
