"""How the cost grows: with tokens, with layers, with the size of the model, with candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import Data, layer_parameters, open_quietly, record, repeat
from polylens.crown import CrownDelta, run_crown
from polylens.hidden_states import Keep, collect_hidden_states
from polylens.machine import keeping_freed_memory
from polylens.models.structure import find_structure

TOKENS = (1000, 2000, 4000, 8000)
LAYERS = (5, 10, 20, 30)
CANDIDATES = (0, 1, 2, 4, 8)
WIDTHS = (384, 576, 768, 1024, 1536)  # of random models of 12 layers
BUDGET = 1024


def run(name: str, data: Data) -> None:
    """Measure and record."""
    model = open_quietly(name, dtype="float32")
    structure = model.structure
    prompts = [list(ids) for ids in data.rows(model).ids]
    result: dict[str, Any] = {"model": name, "data": data.name}

    def seconds(structure: Any, ids: list[list[int]], keep: Keep) -> float:
        return min(
            repeat(2, lambda: collect_hidden_states(structure, ids, keep, token_budget=BUDGET))
        )

    def of_tokens(n: int) -> list[list[int]]:
        chosen: list[list[int]] = []
        while sum(map(len, chosen)) < n:
            chosen.append(prompts[len(chosen) % len(prompts)])
        return chosen

    whole = Keep(final=True)
    result["tokens"] = {str(n): seconds(structure, of_tokens(n), whole) for n in TOKENS}
    some = of_tokens(2000)
    result["layers"] = {
        str(n): seconds(structure, some, Keep(boundary_layers=(n,))) for n in LAYERS
    }
    result["parameters"] = {}
    for width in WIDTHS:
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=12,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
        )
        other = find_structure(LlamaForCausalLM(config).eval())
        n = 12 * sum(p.numel() for p in other.layers[0].parameters())
        short = [[token % 1000 for token in ids] for ids in of_tokens(2000)]
        result["parameters"][str(n)] = seconds(other, short, whole)
    boundary = structure.n_layers - 2
    delta = CrownDelta(
        {
            name: torch.zeros_like(p)
            for name, p in model.causal_lm.named_parameters()
            if any(f".{layer}." in name for layer in (boundary, boundary + 1))
        },
        {"layers": (boundary, boundary + 1)},
    )
    result["candidates"] = {}

    def score(n: int) -> None:
        keep = Keep(boundary_layers=(boundary,))
        states = collect_hidden_states(structure, some, keep, token_budget=BUDGET)
        with keeping_freed_memory():
            for _ in range(n):
                with delta.applied(structure):
                    for _ in run_crown(structure, states, token_budget=BUDGET):
                        pass

    for n in CANDIDATES:
        result["candidates"][str(n)] = min(repeat(2, lambda n=n: score(n)))
    result["n_layer_parameters"] = layer_parameters(model)
    record("growth", result)
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """Return the numbers behind the plot."""
    titles = {
        "tokens": "tokens",
        "layers": "layers run",
        "parameters": "layer parameters",
        "candidates": "further candidates",
    }
    lines = ["| of | seconds |", "|-|-|"]
    for key, title in titles.items():
        values = ", ".join(f"{int(x):,}: {y:.1f}" for x, y in result[key].items())
        lines.append(f"| {title} | {values} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], target: Path) -> None:
    """Draw the four curves."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "polylens"  # the same file every time
    from matplotlib import pyplot

    panels = {
        "tokens": ("tokens", 1.0),
        "layers": ("decoder layers run", 1.0),
        "parameters": ("parameters of all layers, millions", 1e6),
        "candidates": ("candidates scored", 1.0),
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(12, 2.8), constrained_layout=True)
    for axis, (key, (title, unit)) in zip(axes, panels.items(), strict=True):
        x = [int(value) / unit for value in result[key]]
        y = list(result[key].values())
        axis.plot(x, y, marker="o", color="#2563eb")
        axis.set_xlabel(title)
        axis.set_xlim(0)
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    figure.savefig(target, metadata={"Date": None})
