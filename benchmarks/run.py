"""Measure PolyLens against a plain reference and against the floor, side by side, in one run.

    python benchmarks/run.py                        method, floor and growth
    python benchmarks/run.py method --share 5       one part, on a fifth of the data
    python benchmarks/run.py crowns --data-dir DATA     with XCOPA's files in DATA/xcopa
    python benchmarks/run.py large --model-folder /big/disk/llama-8b

Each part runs in a process of its own, prints a table and writes benchmarks/results/PART.json.
`--page` puts the tables, and a plot of how the cost grows, into docs/performance.md and README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import baselines
import crowns
import floor
import growth
import large
import method
import search_cost
from common import RESULTS, Data

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
SMALL, BIG = "smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct"
# The whole data takes the reference half an hour, and the big model an hour, on two cores.
SHARES = {
    "method": 5,
    "floor": 10,
    "growth": 1,
    "crowns": 1,
    "large": 1,
    "search": 5,
    "baselines": 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=", ".join(SHARES))
    parser.add_argument("--data", type=Path, help="folder with the paper's data")
    parser.add_argument("--data-dir", type=Path, help="folder with benchmarks, for crowns")
    parser.add_argument("--share", type=int, help="take one in so many texts and rows")
    parser.add_argument("--model", help="another model")
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
    elif part == "crowns":
        if given.data_dir is None:
            parser.error("crowns reads XCOPA; give the folder that holds it by --data-dir")
        crowns.run(given.model or BIG, given.data_dir)
    elif part == "search":
        search_cost.run(given.model or SMALL, data)
    elif part == "baselines":
        baselines.run(given.model or SMALL, data.share)
    else:
        large.run(given.model or SMALL, data, given.model_folder)


def fill_page() -> None:
    """Put what was measured between its markers in docs/performance.md and README.md."""
    results = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")
    }
    for part, module in (
        ("method", method),
        ("floor", floor),
        ("crowns", crowns),
        ("large", large),
        ("search", search_cost),
        ("baselines", baselines),
    ):
        if part in results:
            result = results[part]
            fill(PAGE, part, f"{module.table(result)}\n\n{result['machine']}, {result['date']}.")
    if "growth" in results:
        growth.plot(results["growth"], PAGE.parent / "images" / "growth.svg")
    if {"method", "floor", "large"} <= results.keys():
        fill(README, "bench", summary(results))


def fill(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end -->`."""
    old = page.read_text(encoding="utf-8")
    marked = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    new = re.sub(marked, lambda found: f"{found[1]}{text}\n{found[2]}", old, flags=re.DOTALL)
    page.write_text(new, encoding="utf-8")


def summary(results: dict[str, Any]) -> str:
    """Return the figures for the README."""
    whole, near, big = results["method"], results["floor"], results["large"]
    memory, streamed = near["in_memory"], near["streamed"]
    peak = max(streamed[part]["peak_bytes"] for part in ("probe", "trunk", "crown_epoch"))
    return (
        f"On two CPU cores ({whole['machine']}, float32): the method on SmolLM2-135M with "
        f"{whole['data']} in 7 languages is {whole['times_faster']:.1f} times as fast as what the "
        "published scripts do. Qwen2.5-Coder-1.5B's trunk pass takes "
        f"{memory['probe']['over_floor']:.2f} times what its matrix products alone would, and an "
        f"epoch of training {memory['crown_epoch']['over_floor']:.2f} times; streamed, both stay "
        f"within {peak / 1e9:.1f} GB "
        f"and a pass takes {near['streaming_over_memory']:.2f} times as long. A model of "
        f"{big['n_parameters'] / 1e9:.0f} billion parameters was probed and its top layers trained "
        f"in {big['peak_bytes'] / 1e9:.1f} GB."
    )


if __name__ == "__main__":
    main()
