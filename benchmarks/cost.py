"""What probing and training cost against their floor, measured side by side in one run.

The floor is the time that the counted floating-point operations take at the measured rate of a
float32 matrix product of 1,024 rows. Run: python benchmarks/cost.py [MODEL]; it prints a table and
writes benchmarks/results/cost.json. The table in docs/performance.md is its output.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from polylens import load_model, starter_corpus
from polylens.cli.doctor import matmul_flops
from polylens.config import DEFAULT_MODEL, TrainSettings
from polylens.hidden_states import Keep, collect_hidden_states
from polylens.prompts import choose_format
from polylens.steps import encode_parallel
from polylens.subspaces import probe_subspaces
from polylens.training import ParallelStates, train_crown

LANGUAGES = ("en", "sw", "es", "zh")
N_ROWS = 32


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_MODEL
    model = load_model(name)
    structure = model.structure
    rows = starter_corpus().limit(N_ROWS)
    prompts = encode_parallel(
        rows, LANGUAGES, choose_format(model.tokenizer), model.tokenizer, max_tokens=128
    )
    n_layer = sum(p.numel() for p in structure.layers[0].parameters())
    rate = matmul_flops("auto")

    collect_hidden_states(structure, prompts.ids[:8], Keep(final=True))  # warm up
    started = time.monotonic()
    keep = Keep(pooling="last", boundary_layers=(structure.n_layers - 2,), final=True)
    states = collect_hidden_states(structure, prompts.ids, keep)
    trunk_seconds = time.monotonic() - started
    trunk_floor = 2 * n_layer * structure.n_layers * prompts.n_tokens / rate

    assert states.pooled is not None
    pooled = {
        language: states.pooled[[row[language] for row in prompts.rows if language in row]]
        for language in LANGUAGES
    }
    subspaces = probe_subspaces(pooled, central="en")
    started = time.monotonic()
    parallel = ParallelStates(states, prompts.rows, "en")
    train_crown(structure, subspaces, parallel, TrainSettings(epochs=1), token_budget=1024)
    crown_seconds = time.monotonic() - started
    crown_floor = 3 * 2 * n_layer * 2 * prompts.n_tokens / rate

    result = {
        "model": name,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "tokens": prompts.n_tokens,
        "matmul_gflops": rate / 1e9,
        "trunk": {"seconds": trunk_seconds, "over_floor": trunk_seconds / trunk_floor},
        "crown_epoch": {"seconds": crown_seconds, "over_floor": crown_seconds / crown_floor},
    }
    target = Path(__file__).parent / "results" / "cost.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """Return the result as it stands in docs/performance.md."""
    lines = ["| work | seconds | times the floor |", "|-|-|-|"]
    for part, what in (("trunk", "trunk pass"), ("crown_epoch", "one epoch of training")):
        measured = result[part]
        lines.append(f"| {what} | {measured['seconds']:.1f} | {measured['over_floor']:.2f} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{result['model']}, {result['tokens']} tokens, {result['threads']} threads, float32, "
            f"matrix product at {result['matmul_gflops']:.0f} GFLOP/s.",
        ]
    )


if __name__ == "__main__":
    main()
