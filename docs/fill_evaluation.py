"""Put what `polylens evaluate` measured into docs/evaluation.md, between its markers.

Run: python docs/fill_evaluation.py NAME=FOLDER [NAME=FOLDER ...]

`<!-- NAME -->` and `<!-- end -->` in docs/evaluation.md enclose the table of a folder of answers.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from polylens.artefacts import read_json
from polylens.evaluation.measures import Measure, Scorecard

PAGE = Path(__file__).parent / "evaluation.md"


def block(folder: Path) -> str:
    summary = read_json(folder / "summary.json")
    identity = Scorecard(folder / "before").identity
    lines = [
        "| task | n | before | after | difference | p, corrected |",
        "|-|-|-|-|-|-|",
    ]
    (found,) = summary["measures"].values()
    for one in map(Measure.from_dict, found):
        change, arrow = one.change, "↑" if one.task.higher_is_better else "↓"
        cells = [
            f"{one.task.name} {arrow}",
            str(change.n),
            interval(change.before, *one.before_interval),
            interval(change.after, *one.after_interval),
            interval(change.difference, change.low, change.high, "+"),
            f"{one.p_corrected:.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    (verdict,) = summary["gate"].values()
    holds = "no verdict" if verdict is None else "holds" if verdict["holds"] else "fails"
    versions = identity["versions"]
    lines.append(
        f"\n{identity['model']}, {identity['dtype']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}. Gate: {holds}."
    )
    return "\n".join(lines)


def interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for argument in sys.argv[1:]:
        name, _, folder = argument.partition("=")
        marked = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = block(Path(folder))
        page, n = marked.subn(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
        if n != 1:
            raise SystemExit(f"{PAGE.name} must hold <!-- {name} --> once, but holds it {n} times")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
