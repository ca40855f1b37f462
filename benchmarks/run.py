"""Measure PolyLens against a plain reference and against the floor, side by side, in one run.

    python benchmarks/run.py                        all parts but the large model
    python benchmarks/run.py method --share 5       one part, on a fifth of the data
    python benchmarks/run.py large --model-folder /big/disk/llama-8b

Each part runs in a process of its own, prints a table and writes benchmarks/results/PART.json.
`--page` puts the tables, and a plot of how the cost grows, into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import floor
import growth
import large
import method
from common import RESULTS, Data

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SMALL, BIG = "smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct"
# The whole data takes the reference half an hour, and the big model an hour, on two cores.
SHARES = {"method": 5, "floor": 10, "growth": 1, "large": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help="method, floor, growth, large")
    parser.add_argument("--data", type=Path, help="folder with the paper's data")
    parser.add_argument("--share", type=int, help="take one in so many texts and rows")
    parser.add_argument("--model", help="another model for method, floor or growth")
    parser.add_argument("--model-folder", type=Path, default=Path("runs/llama-8b-random"))
    parser.add_argument("--page", action="store_true", help="fill docs/performance.md and stop")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.page:
        fill_page()
        return
    parts = given.parts or ["method", "floor", "growth"]
    for part in parts:
        if part not in SHARES:
            parser.error(f"parts are {', '.join(SHARES)}, got {part!r}")
    if not given.here:
        for part in parts:
            print(f"\n{part}\n", flush=True)
            rest = [argument for argument in sys.argv[1:] if argument not in parts]
            subprocess.run([sys.executable, __file__, part, "--here", *rest], check=True)
        return
    (part,) = parts
    data = Data(given.data, given.share or SHARES[part])
    if part == "method":
        method.run(given.model or SMALL, data)
    elif part == "floor":
        floor.run(given.model or BIG, data)
    elif part == "growth":
        growth.run(given.model or SMALL, data)
    else:
        large.run(given.model or SMALL, data, given.model_folder)


def fill_page() -> None:
    """Put every table that was measured between its markers in docs/performance.md."""
    text = PAGE.read_text(encoding="utf-8")
    for part, module in (("method", method), ("floor", floor), ("large", large)):
        path = RESULTS / f"{part}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        table = f"{module.table(result)}\n\n{result['machine']}, {result['date']}."
        marked = rf"(<!-- {part} -->\n).*?(<!-- end -->)"
        text = re.sub(
            marked, lambda found, t=table: f"{found[1]}{t}\n{found[2]}", text, flags=re.DOTALL
        )
    PAGE.write_text(text, encoding="utf-8")
    path = RESULTS / "growth.json"
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        growth.plot(result, PAGE.parent / "images" / "growth.svg")


if __name__ == "__main__":
    main()
