"""Write docs/results.md from the values that experiments/run.py kept.

    python experiments/page.py

`<!-- NAME -->` and `<!-- end -->` in the page enclose what this script writes; the words around are
ours. A row of the corpus is the unit of every interval: its languages and seeds are averaged first,
so that a row's translations do not count as independent examples.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from design import CENTRAL, GROUPS, LANGUAGES
from polylens.artefacts import read_json
from polylens.config import GateSettings
from polylens.evaluation.choices import CHOICES
from polylens.evaluation.gate import check_gate
from polylens.evaluation.measures import Example, Protocol, Task
from polylens.evaluation.statistics import PairedDifference, compare_paired
from polylens.evaluation.suite import BITS_PER_BYTE
from polylens.forecast import Signs
from prediction import Case, Gains, forecast_block

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
NAMES = {
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct",
    "gemma3-270m": "Gemma-3-270M",
    "qwen2.5-coder-1.5b-instruct": "Qwen2.5-Coder-1.5B-Instruct",
}
FORECAST = ("default", "answers")  # what `polylens doctor --forecast` speaks of
# The search's settings for one language, trained on seven, beside what needs no search.
SEARCHED = ("states", "searched", "searched-half", "answers")
# The default preset, which holds each token's state, and what it was before.
HOLDING = (
    "states",
    "states-slow",
    "states-slower",
    "default",
    "default10",
    "default-slower",
)
MAIN = (
    "paper",
    "states",
    "states-quarter",
    "default",
    "default10",
    "default-push",
    "default-swahili",
    "default10-swahili",
    "answers",
    "answers-64",
    "answers-64-quarter",
    "answers-english-half",
    "sft",
    "sft-quarter",
    "sft-translations",
    "sft-lora",
    "pretraining",
    "pretraining-replay",
    "few-shot",
    "steering",
    "steering-half",
)


@dataclass(frozen=True)
class Side:
    """What was measured of one setting, seed by seed; of the untouched model there is one."""

    contents: tuple[Mapping[str, Any], ...]

    @cached_property
    def tasks(self) -> list[dict[str, Mapping[str, Any]]]:
        """For each seed: task → its values."""
        return [
            {task["task"]: task for part in content["parts"].values() for task in part}
            for content in self.contents
        ]

    def rows(self, names: Sequence[str]) -> np.ndarray | None:
        """Mean over tasks and seeds of each row's value; None where one was not measured."""
        seeds = [seed for seed in self.tasks if all(name in seed for name in names)]
        if not seeds or not names:
            return None
        return np.mean([[seed[name]["values"] for name in names] for seed in seeds], axis=(0, 1))

    def of_seeds(self, names: Sequence[str]) -> list[float]:
        """The mean of each seed."""
        return [
            float(np.mean([seed[name]["values"] for name in names]))
            for seed in self.tasks
            if all(name in seed for name in names)
        ]


def read(model: str, split: str) -> dict[str, Side]:
    """Return setting → what was measured."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for path in sorted((HERE / "results" / model / split).glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        if path.stem == "base":
            name, seed = "base", "0"
        found.setdefault(name, []).append((int(seed), read_json(path)))
    return {
        name: Side(tuple(content for _, content in sorted(seeds, key=lambda one: one[0])))
        for name, seeds in found.items()
    }


def compare(base: Side, side: Side, names: Sequence[str]) -> PairedDifference | None:
    """Compare rows; of texts and replies in percent of the base's mean."""
    before, after = base.rows(names), side.rows(names)
    if before is None or after is None:
        return None
    scale = 100.0 / float(before.mean()) if _metric(base, names) == BITS_PER_BYTE else 1.0
    return compare_paired(list(before * scale), list(after * scale))


def _metric(side: Side, names: Sequence[str]) -> str:
    return str(side.tasks[0][names[0]]["metric"])


@dataclass(frozen=True)
class Column:
    """A figure of the tables."""

    title: str
    prefix: str
    suffix: str = ""
    percent: bool = True

    def of(self, languages: Sequence[str], side: Side) -> list[str]:
        """Names of the tasks in these languages that there are."""
        wanted = [f"{self.prefix}_{k}{self.suffix}" for k in languages]
        return [name for name in wanted if any(name in seed for seed in side.tasks)]

    def cell(
        self, base: Side, side: Side, languages: Sequence[str], *, with_interval: bool = True
    ) -> str:
        """The difference with its interval; of the base, the figure."""
        names = self.of(languages, base)
        if not names:
            return ""
        if side is base:
            rows = base.rows(names)
            assert rows is not None
            return f"{rows.mean():.3f}" if self.percent else f"{rows.mean():.0f}"
        found = compare(base, side, names)
        if found is None:
            return ""
        factor, digits = self._unit(base, names)
        low, high = found.low * factor, found.high * factor
        text = f"{found.difference * factor:+.{digits}f}"
        if with_interval:
            # Rows that hardly differ bound nothing on one side.
            from_, to = f"{low:+.{digits}f}", f"{high:+.{digits}f}"
            interval = f"{from_} to {to}"
            if math.inf in (-low, high):
                interval = f"at least {from_}" if low > -math.inf else f"at most {to}"
            text = f"{text} ({interval})"
        return f"**{text}**" if low > 0 or high < 0 else text

    def _unit(self, base: Side, names: Sequence[str]) -> tuple[float, int]:
        if _metric(base, names) == BITS_PER_BYTE:
            return 1.0, 2  # percent already
        if _metric(base, names) == "bits":
            return 1.0, 3
        return (100.0, 1) if self.percent else (1.0, 0)


REPLIES = Column("replies, %", "replies")
TEXTS = Column("texts, %", "bits_per_byte")
FIDELITY = Column("in language, points", "fidelity")
REPEATING = Column("repeating, points", "repeating")
ECHOING = Column("echoing, points", "echoing")
SOUND = Column("sound, points", "sound")
LENGTH = Column("length, characters", "length", percent=False)
LETTERS = Column("XCOPA letters, points", "xcopa", "_letters")
CHOICE = Column("choice, bits", CHOICES)
CONTINUATION = Column("XCOPA continuation, points", "xcopa")
COLUMNS = (
    REPLIES,
    TEXTS,
    CHOICE,
    FIDELITY,
    REPEATING,
    ECHOING,
    SOUND,
    LENGTH,
    LETTERS,
    CONTINUATION,
)
# Of answers under a repetition penalty, the same for every side.
PENALISED = tuple(
    dataclasses.replace(one, suffix="_penalised")
    for one in (FIDELITY, REPEATING, ECHOING, SOUND, LENGTH)
)


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
    pairs = []
    asked: list[tuple[str, Column, Protocol]] = [(k, TEXTS, "text") for k in (CENTRAL, *LANGUAGES)]
    for language, column, protocol in (*asked, (CENTRAL, CHOICE, "choice")):
        names = column.of([language], base)
        before, after = base.rows(names), side.rows(names)
        if before is None or after is None:
            if column is TEXTS:
                return ""
            continue
        task = Task(names[0], language, protocol, _metric(base, names), False)
        pairs.append((task, _examples(before), _examples(after)))
    verdict = check_gate(pairs, [CENTRAL], GateSettings(), texts_of=LANGUAGES)
    assert verdict is not None
    failed = [
        f"{check.language}'s choices" if check.protocol == "choice" else check.language
        for check in verdict.checks
        if not check.result.holds
    ]
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


def forecast_cases(settings: Sequence[str]) -> list[Case]:
    """Signs and gains of every model that has both; gains are on the rows that are reported."""
    cases = []
    for model, title in NAMES.items():
        path, sides = HERE / "results" / model / "signs.json", read(model, "report")
        if not path.exists() or "base" not in sides:
            continue
        signs = read_json(path)["signs"]
        cases += [
            Case(
                title,
                language,
                Signs(**signs[language]),
                {name: _gains(sides, name, language) for name in settings},
            )
            for language in LANGUAGES
        ]
    return cases


def _gains(sides: Mapping[str, Side], setting: str, language: str) -> Gains:
    if setting not in sides:
        return Gains()

    def of(column: Column, factor: float) -> float | None:
        names = column.of([language], sides["base"])
        found = compare(sides["base"], sides[setting], names)
        return None if found is None else factor * found.difference

    return Gains(of(REPLIES, -1.0), of(FIDELITY, 100.0), of(REPEATING, 100.0))


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
    ("states", "default", "retain each token's state, of the targets too, not English mean states"),
    ("default", "default10", "the same, at ten times the weight"),
    ("default-no-separate", "default", "separate, in the default preset"),
    ("default-no-align", "default", "align, in the default preset"),
    ("default-english", "default", "retain the targets' tokens, too, not English ones alone"),
    ("default-layers1", "default", "train two layers, not one, in the default preset"),
    ("default-rank1", "default", "six dimensions of the specific subspace, not one"),
    ("default-rank3", "default", "six dimensions of the specific subspace, not three"),
    ("default", "default-complement", "align in all that is not specific, in the default preset"),
    ("default-rows25", "default-rows50", "48 rows, not 24, in the default preset"),
    ("default-rows50", "default", "96 rows, not 48, in the default preset"),
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
    for model, title in NAMES.items():
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
    paths = sorted((HERE / "results" / model / "steering").glob("*.json"))
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
    paths = sorted((HERE / "results" / model / "search").glob("*.json"))
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


def _gain(gain: Mapping[str, float]) -> str:
    return f"{gain['value']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f})"


def _change(measures: Sequence[Mapping[str, Any]], language: str) -> str:
    """Bits per byte of texts against the untouched model's."""
    for one in measures:
        if one["task"]["name"] == f"bits_per_byte_{language}":
            change = one["change"]
            return f"{change['difference']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
    return ""


def blocks() -> dict[str, str]:
    """Everything that the page takes from the files."""
    found = {}
    if cases := forecast_cases(FORECAST):
        found["forecast"] = forecast_block(cases, FORECAST)
    if compared := models_table(HOLDING):
        found["holding"] = compared
    for model in NAMES:
        if steered := steering_table(model):
            found[f"{model} steering"] = steered
        if grouped := groups_table(model):
            found[f"{model} groups"] = grouped
        if searched := search_table(model):
            found[f"{model} search"] = searched
        for split in ("report", "development"):
            sides = read(model, split)
            if "base" not in sides:
                continue
            chosen = MAIN if split == "report" else [name for name in sides if name != "base"]
            found[f"{model} {split} targets"] = table(sides, chosen, LANGUAGES)
            found[f"{model} {split} central"] = table(sides, chosen, (CENTRAL,))
            if split == "development":
                found[f"{model} steps"] = steps_table(sides)
                found[f"{model} searched"] = languages_table(sides, SEARCHED, (REPLIES, TEXTS))
            else:
                penalised = [
                    one for one in chosen if one in sides and PENALISED[0].of(LANGUAGES, sides[one])
                ]
                found[f"{model} penalised targets"] = table(sides, penalised, LANGUAGES, PENALISED)
                found[f"{model} penalised languages"] = languages_table(
                    sides, penalised, [one for one in PENALISED if one.percent]
                )
                found[f"{model} seeds"] = seed_spread(sides, chosen)
                found[f"{model} languages"] = languages_table(
                    sides, chosen, (TEXTS, FIDELITY, REPEATING, SOUND)
                )
    return found


def main() -> None:
    """Fill the page."""
    page = PAGE.read_text(encoding="utf-8")
    for name, text in blocks().items():
        marked = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = marked.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
