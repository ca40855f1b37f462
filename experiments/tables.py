"""The tables of docs/results.md, each from kept values alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from design import CENTRAL, GROUPS, LANGUAGES, MODELS, SETTINGS
from kept import (
    CHOICE,
    COLUMNS,
    FIDELITY,
    LETTERS,
    REPEATING,
    REPLIES,
    SOUND,
    TEXTS,
    Column,
    Side,
    compare,
    folder,
    metric,
    read,
)
from polylens.artefacts import read_json
from polylens.config import GateSettings
from polylens.evaluation.gate import check_gate
from polylens.evaluation.measures import Example, Task
from polylens.evaluation.statistics import non_inferior


def table(
    sides: Mapping[str, Side],
    chosen: Sequence[str],
    languages: Sequence[str],
    columns: Sequence[Column] = COLUMNS,
) -> str:
    """One row a setting, one column a figure that was measured."""
    base = sides["base"]
    columns = [one for one in columns if one.of(languages, base)]
    is_gated = CENTRAL in languages
    head = ["setting", "seeds", *(one.title for one in columns), *["gate"] * is_gated]
    lines = [f"| {' | '.join(head)} |", f"|{'-|' * len(head)}"]
    for name in ("base", *chosen):
        if name not in sides:
            continue
        side = sides[name]
        cells = [one.cell(base, side, languages) for one in columns]
        if is_gated:
            cells.append(gate(base, side) if side is not base else "")
        of_first = columns[0].of(languages, side) if columns else []
        n_seeds = sum(all(one in seed for one in of_first) for seed in side.tasks)
        seeds = "" if name == "base" else str(n_seeds)
        lines.append(f"| {' | '.join([name, seeds, *cells])} |")
    return "\n".join(lines)


def gate(base: Side, side: Side) -> str:
    """Whether harm beyond the margins is ruled out, as `enhance` asks, and where not."""
    settings, pairs = GateSettings(), []
    for language in (CENTRAL, *LANGUAGES):
        names = TEXTS.of([language], base)
        before, after = base.rows(names), side.rows(names)
        if before is None or after is None:
            return ""
        task = Task(names[0], language, "text", metric(base, names), False)
        pairs.append((task, _examples(before), _examples(after)))
    verdict = check_gate(pairs, [CENTRAL], settings, texts_of=LANGUAGES)
    assert verdict is not None
    failed = [check.language for check in verdict.checks if not check.result.holds]
    # Of several seeds; the gate itself reads log odds, which are of one.
    names = CHOICE.of([CENTRAL], base)
    before, after = base.rows(names), side.rows(names, base)
    if before is not None and after is not None:
        found = non_inferior(before, after, settings.choice_margin, level=settings.level)
        failed += [] if found.holds else [f"{CENTRAL}'s choices"]
    return f"fails: {', '.join(failed)}" if failed else "holds"


def _examples(values: np.ndarray) -> list[Example]:
    return [Example(str(row), float(value)) for row, value in enumerate(values)]


def languages_table(
    sides: Mapping[str, Side], chosen: Sequence[str], columns: Sequence[Column]
) -> str:
    """Figure by figure what became of each language, which a mean over languages can hide."""
    languages = (*LANGUAGES, CENTRAL)
    lines = [
        f"| figure | setting | {' | '.join(languages)} |",
        f"|{'-|' * (2 + len(languages))}",
    ]
    for column in columns:
        for name in ("base", *chosen):
            if name in sides and column.of(languages, sides[name]):
                cells = [
                    column.cell(sides["base"], sides[name], [one], with_interval=False)
                    for one in languages
                ]
                lines.append(f"| {column.title} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def seed_spread(sides: Mapping[str, Side], chosen: Sequence[str]) -> str:
    """How far seeds lie apart, beside how far the setting lies from the base."""
    base = sides["base"]
    lines = ["| setting | replies of each seed, % |", "|-|-|"]
    names = REPLIES.of(LANGUAGES, base)
    (before,) = base.of_seeds(names)
    for name in chosen:
        if name in sides and len(sides[name].contents) > 1:
            each = [100 * (one / before - 1) for one in sides[name].of_seeds(names)]
            lines.append(f"| {name} | {', '.join(f'{one:+.2f}' for one in each)} |")
    return "\n".join(lines)


# What each of these changes in the one before it; on the development rows.
STEPS = (
    ("faster", "states", "push by what answers lack, not all alike"),
    ("states", "auto", "retain the distribution, not mean states"),
    ("auto-states10", "auto-kl10", "the same, at ten times the weight"),
    ("no-align", "auto", "align"),
    ("auto-kl10", "answer-kl10", "act along a reply, not at the last prompt token"),
    ("answers-64", "answers-lens", "align and separate, beside learning answers"),
    ("answers-64", "answers-english", "learn English answers as well"),
    ("answers-64", "answers-retain", "learn 128 tokens of an answer, not 64"),
    ("answers-retain", "answers", "retain nothing while learning answers"),
    ("answers", "sft", "a step for 8 answers of any language, not for 2 rows in all six"),
    ("no-separate", "auto", "separate"),
    ("no-retain", "states", "retain mean states"),
    ("auto", "complement", "align in all that is not specific, not in one dimension"),
    ("states", "tokens", "retain each token's state, of the targets too, not English mean states"),
    ("tokens", "tokens10", "the same, at ten times the weight"),
    ("tokens", "default", "retain questions with two answers, too"),
    ("tokens-no-separate", "tokens", "separate, where tokens are retained"),
    ("tokens-no-align", "tokens", "align, where tokens are retained"),
    ("tokens-english", "tokens", "retain the targets' tokens, too, not English ones alone"),
    ("tokens-layers1", "tokens", "train two layers, not one, where tokens are retained"),
    ("tokens-rank1", "tokens", "six dimensions of the specific subspace, not one"),
    ("tokens-rank3", "tokens", "six dimensions of the specific subspace, not three"),
    ("tokens", "tokens-complement", "align in all that is not specific, where tokens are retained"),
    ("tokens-rows25", "tokens-rows50", "48 rows, not 24, where tokens are retained"),
    ("tokens-rows50", "tokens", "96 rows, not 48, where tokens are retained"),
    ("faster-pads", "faster", "probe at the last real token, not at a pad"),
    ("faster-cuts", "faster", "cut a long prompt's text, not the end of its template"),
    ("tokens-pads", "tokens", "probe at the last real token, where tokens are retained"),
    ("tokens-cuts", "tokens", "cut a long prompt's text, where tokens are retained"),
    ("layers1", "auto", "train two layers, not one"),
    ("auto", "layers4", "train four layers, not two"),
    ("rows25", "rows50", "48 rows, not 24"),
    ("rows50", "auto", "96 rows, not 48"),
    ("states", "small-batch", "two rows a step, not eight"),
)


def steps_table(sides: Mapping[str, Side]) -> str:
    """What one change makes of a setting, row by row."""
    lines = [
        "| change | from, to | targets: replies, % | texts, % | English: replies, % | texts, % |",
        f"|{'-|' * 6}",
    ]
    for before, after, what in STEPS:
        if before in sides and after in sides:
            cells = [
                column.cell(sides[before], sides[after], languages)
                for languages in (LANGUAGES, (CENTRAL,))
                for column in (REPLIES, TEXTS)
            ]
            lines.append(f"| {what} | {before}, {after} | {' | '.join(cells)} |")
    return "\n".join(lines)


def models_table(settings: Sequence[str]) -> str | None:
    """What some settings do to every model, on the development rows; None where none is kept."""
    head = ["model", "setting", "replies, %", "texts, %", "of one language at worst, %"]
    head += ["English: replies, %", "texts, %", "gate"]
    lines = [f"| {' | '.join(head)} |", f"|{'-|' * len(head)}"]
    for model, title in MODELS.items():
        sides = read(model, "development")
        for name in settings:
            if name not in sides:
                continue
            base, side = sides["base"], sides[name]
            compared = {k: compare(base, side, TEXTS.of([k], base)) for k in LANGUAGES}
            changes = {k: one.difference for k, one in compared.items() if one is not None}
            worst = max(changes, key=lambda k: changes[k])
            cells = [column.cell(base, side, LANGUAGES) for column in (REPLIES, TEXTS)]
            cells.append(f"{worst} {TEXTS.cell(base, side, [worst])}")
            cells += [column.cell(base, side, (CENTRAL,)) for column in (REPLIES, TEXTS)]
            lines.append(f"| {' | '.join([title, name, *cells, gate(base, side)])} |")
    return "\n".join(lines) if len(lines) > 2 else None


def letters_table(model: str) -> str | None:
    """What choices foretell beside what letters of a benchmark lost, by the former."""
    rows = []
    for split in ("development", "report"):
        sides = read(model, split)
        for name in sides:
            base, side = sides["base"], sides[name]
            columns = ((CHOICE, CENTRAL), (LETTERS, CENTRAL), (LETTERS, "zh"))
            found = [compare(base, side, column.of([k], base)) for column, k in columns]
            if side is base or found[0] is None or found[1] is None:
                continue
            cells = [column.cell(base, side, [k]) for column, k in columns]
            rows.append((found[0].difference, found[1].difference, [name, split, *cells]))
    if len(rows) < 3:
        return None
    lines = ["| setting | rows | choices | English letters | Chinese letters |", f"|{'-|' * 5}"]
    lines += [f"| {' | '.join(cells)} |" for _, _, cells in sorted(rows, reverse=True)]
    agreement = spearmanr([one[:2] for one in rows]).statistic
    return "\n".join(
        [*lines, "", f"Rank correlation of choices and English letters: {agreement:.2f}."]
    )


def groups_table(model: str) -> str | None:
    """Languages like the central one beside others, each group trained by itself."""
    columns = (REPLIES, TEXTS, FIDELITY, REPEATING, SOUND)
    lines = [
        f"| languages | setting | {' | '.join(one.title for one in columns)} "
        "| English: replies, % | texts, % |",
        f"|{'-|' * (len(columns) + 4)}",
    ]
    for split, languages in GROUPS.items():
        sides = read(model, split)
        for name in sorted(sides, key=lambda one: (one != "base", one)):
            cells = [column.cell(sides["base"], sides[name], languages) for column in columns]
            cells += [c.cell(sides["base"], sides[name], (CENTRAL,)) for c in (REPLIES, TEXTS)]
            lines.append(f"| {', '.join(languages)} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else None


def steering_table(model: str) -> str | None:
    """What `polylens steer --measure` found, language by language; None where nothing was kept.

    Answers in the central language to questions in the other one are its leakage.
    """
    paths = sorted((folder(model) / "steering").glob("*.json"))
    if not paths:
        return None
    lines = [
        "| towards | strength | answers in it | in English | repeating | bits per byte, change "
        "| English questions answered in English | repeating | bits per byte, change |",
        f"|{'-|' * 9}",
    ]
    for path in paths:
        content = read_json(path)
        for one in content["results"]:
            cells = [f"{action['strength']:g}" for action in one["actions"]] or ["none"]
            for language in (path.stem, CENTRAL):
                own = one["fidelity"][language]
                cells.append(f"{own['passed']} of {own['n']}")
                if language != CENTRAL:
                    cells.append(str(own["answered"].get(CENTRAL, 0)))
                cells += [str(own["repeating"]), _change(one["measures"], language)]
            lines.append(f"| {' | '.join([path.stem, *cells])} |")
    return "\n".join(lines)


def search_table(model: str) -> str | None:
    """What `polylens search` chose, beside the default settings; None where nothing was kept."""
    paths = sorted((folder(model) / "search").glob("*.json"))
    if not paths:
        return None
    lines = [
        "| language | trials | settings | dial | gain on development rows, % | on report rows, % "
        "| gate on report rows |",
        f"|{'-|' * 7}",
    ]
    for path in paths:
        content = read_json(path)
        usual = content["default"]["settings"]
        for name in ("default", "best"):
            one = content[name]
            changed = [f"{k}={v}" for k, v in one["settings"].items() if v != usual[k]]
            cells = [
                path.stem,
                str(content["n_trials"]),
                ", ".join(changed) or "the default of then",
                f"{one['development']['strength']:g}",
                *(_gain(one[rows]["gain"]) for rows in ("development", "report")),
                "holds" if one["report"]["holds"] else "fails",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def preview_table() -> str | None:
    """How the order by replies alone agrees with that by replies and texts; None without any."""
    lines = ["| model | settings | rank correlation |", "|-|-|-|"]
    for model, title in MODELS.items():
        sides = read(model, "development")
        if "base" not in sides:
            continue
        of_lens = [
            sides[name]
            for name, known in SETTINGS.items()
            if name in sides and known.method == "lens" and not known.settings.get("answer_weight")
        ]
        gains = []
        for side in of_lens:
            replies, texts = (
                compare(sides["base"], side, one.of(LANGUAGES, sides["base"]))
                for one in (REPLIES, TEXTS)
            )
            if replies is not None and texts is not None:
                gains.append((-replies.difference, -replies.difference - texts.difference))
        if len(gains) > 2:
            agreement = spearmanr(*zip(*gains, strict=True)).statistic
            lines.append(f"| {title} | {len(gains)} | {agreement:.2f} |")
    return "\n".join(lines) if len(lines) > 2 else None


def _gain(gain: Mapping[str, float]) -> str:
    return f"{gain['value']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f})"


def _change(measures: Sequence[Mapping[str, Any]], language: str) -> str:
    """Bits per byte of texts against the untouched model's."""
    for one in measures:
        if one["task"]["name"] == f"bits_per_byte_{language}":
            change = one["change"]
            return f"{change['difference']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
    return ""
