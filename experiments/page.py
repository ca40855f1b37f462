"""Write docs/results.md from the values that experiments/run.py kept.

    python experiments/page.py

`<!-- NAME -->` and `<!-- end -->` in the page enclose what this script writes; the words around are
ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from design import CENTRAL, LANGUAGES, MODELS
from kept import (
    FIDELITY,
    PENALISED,
    REPEATING,
    REPLIES,
    SOUND,
    TEXTS,
    Column,
    Side,
    compare,
    folder,
    read,
)
from polylens.artefacts import read_json
from polylens.forecast import Signs
from prediction import Case, Gains, forecast_block
from tables import (
    groups_table,
    languages_table,
    letters_table,
    models_table,
    preview_table,
    search_table,
    seed_spread,
    steering_table,
    steps_table,
    table,
)

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
# What the forecast was measured with; `tokens` is the default preset but for the questions that
# are retained.
FORECAST = ("tokens", "answers")
# The search's settings for one language, trained on seven, beside what needs no search.
SEARCHED = ("states", "searched", "searched-half", "answers")
# The default preset as it was before it held each token's state, and when it did.
HOLDING = (
    "states",
    "states-slow",
    "states-slower",
    "tokens",
    "tokens10",
    "tokens-slower",
)
MAIN = (
    "paper",
    "states",
    "states-quarter",
    "tokens",
    "tokens10",
    "tokens-no-align",
    "tokens-push",
    "tokens-swahili",
    "tokens-swahili-three-eighths",
    "tokens-swahili-no-align",
    "tokens10-swahili",
    "default",
    "default-swahili",
    "answers",
    "answers-64",
    "answers-64-quarter",
    "answers-english-half",
    "sft",
    "sft-quarter",
    "sft-translations",
    "sft-lora",
    "sft-replay",
    "pretraining",
    "pretraining-replay",
    "few-shot",
    "steering",
    "steering-half",
)


def forecast_cases(settings: Sequence[str]) -> list[Case]:
    """Signs and gains of every model that has both; gains are on the rows that are reported."""
    cases = []
    for model, title in MODELS.items():
        path, sides = folder(model) / "signs.json", read(model, "report")
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


def blocks() -> dict[str, str]:
    """Everything that the page takes from the files."""
    found = {}
    if cases := forecast_cases(FORECAST):
        found["forecast"] = forecast_block(cases, FORECAST)
    if compared := models_table(HOLDING):
        found["holding"] = compared
    if previewed := preview_table():
        found["preview"] = previewed
    for model in MODELS:
        if foretold := letters_table(model):
            found[f"{model} letters"] = foretold
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
