"""What scoring ten crowns on a benchmark costs, beside scoring the model alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from common import DEVICE, open_quietly, record
from polylens.crown import CrownDelta
from polylens.evaluation.harness import CrownsLM, run_task
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.tasks import choose_tasks
from polylens.machine import keeping_freed_memory
from polylens.models.loading import LanguageModel

N_CROWNS = 10
N_LAYERS = 2
N_EXAMPLES = 24
LANGUAGE = "zh"
TASKS = (f"xcopa_{LANGUAGE}", f"xcopa_{LANGUAGE}_letters")


def run(name: str, data_dir: Path) -> None:
    """Measure and record."""
    how = {} if DEVICE.type == "cuda" else {"dtype": "float32"}
    model = open_quietly(name, **how)
    crowns = [Candidate(), *(Candidate(_crown(model, seed)) for seed in range(N_CROWNS))]
    result: dict[str, Any] = {
        "model": name,
        "n_layers": model.structure.n_layers,
        "n_examples": N_EXAMPLES,
        "protocols": {},
    }
    for spec in choose_tasks(TASKS, [LANGUAGE], data_dir):

        def seconds(candidates: list[Candidate], spec: Any = spec) -> float:
            lm = CrownsLM(model, candidates, token_budget=1024)
            started = time.perf_counter()
            with keeping_freed_memory():
                run_task(lm, spec, limit=N_EXAMPLES, data_dir=data_dir)
            return time.perf_counter() - started

        floor = _floor(model, spec, data_dir)
        seconds([Candidate()])  # reads the data, warms up
        # The model alone before and after, so that a machine that slows down does not count.
        first, all_of_them, again = (seconds(some) for some in (crowns[:1], crowns, crowns[:1]))
        alone = (first + again) / 2
        protocol = "chat" if spec.chat else "continuation"
        result["protocols"][protocol] = {
            "alone": alone,
            "with_crowns": all_of_them,
            "ratio": all_of_them / alone,
            **floor,
        }
    record("crowns", result)
    print(table(result))


class _Counting(CrownsLM):
    """Notes the requests."""

    def _loglikelihood_tokens(self, requests: Any, **keywords: Any) -> Any:
        self.pairs = [(tuple(context), tuple(wanted)) for _, context, wanted in requests]
        return super()._loglikelihood_tokens(requests, **keywords)


def _floor(model: LanguageModel, spec: Any, data_dir: Path) -> dict[str, Any]:
    """What the matrix products alone would make of the ratio.

    Every token passes the layers, but the last layer's MLP is needed at the tokens that predict
    alone; the head, too, and there once for every crown.
    """
    lm = _Counting(model, token_budget=1024)
    run_task(lm, spec, limit=N_EXAMPLES, data_dir=data_dir)
    texts = {(*context, *wanted[:-1]) for context, wanted in lm.pairs}
    predicting = {
        ((*context, *wanted[:-1]), len(context) + i)
        for context, wanted in lm.pairs
        for i in range(len(wanted))
    }
    n_tokens, n_predicting = sum(map(len, texts)), len(predicting)
    layer = model.structure.layers[-1]
    of_layer = sum(parameter.numel() for parameter in layer.parameters())
    of_mlp = sum(parameter.numel() for parameter in layer.mlp.parameters())
    of_head = model.causal_lm.lm_head.weight.numel()
    last = (of_layer - of_mlp) * n_tokens + (of_mlp + of_head) * n_predicting
    alone = of_layer * (model.structure.n_layers - 1) * n_tokens + last
    crown = of_layer * (N_LAYERS - 1) * n_tokens + last
    return {
        "n_tokens": n_tokens,
        "n_predicting": n_predicting,
        "floor_ratio": 1 + N_CROWNS * crown / alone,
    }


def _crown(model: LanguageModel, seed: int) -> CrownDelta:
    """A small random change of the last layers."""
    layers = tuple(range(model.structure.n_layers - N_LAYERS, model.structure.n_layers))
    generator = torch.Generator().manual_seed(seed)
    changes = {
        model.structure.parameter_name(layer, name): 1e-4
        * torch.randn(parameter.shape, generator=generator)
        for layer in layers
        for name, parameter in model.structure.layers[layer].named_parameters()
    }
    return CrownDelta(changes, {"layers": layers})


def table(result: dict[str, Any]) -> str:
    """Return the result as a table."""
    lines = [
        f"| XCOPA {LANGUAGE}, {result['n_examples']} examples | tokens, predicting | the model "
        f"alone, s | and {N_CROWNS} crowns of {N_LAYERS} of {result['n_layers']} layers, s | ratio "
        "| by operations alone |",
        "|-|-|-|-|-|-|",
    ]
    alone = with_crowns = 0.0
    for protocol, one in result["protocols"].items():
        alone, with_crowns = alone + one["alone"], with_crowns + one["with_crowns"]
        lines.append(
            f"| {protocol} | {one['n_tokens']}, {one['n_predicting']} | {one['alone']:.1f} "
            f"| {one['with_crowns']:.1f} | {one['ratio']:.2f} | {one['floor_ratio']:.2f} |"
        )
    lines.append(f"| both | | {alone:.1f} | {with_crowns:.1f} | {with_crowns / alone:.2f} | |")
    return "\n".join(lines)
