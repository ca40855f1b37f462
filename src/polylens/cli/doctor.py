"""`polylens doctor`: what this machine has, and what a run would cost here."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from polylens.cache import cache_folder
from polylens.cli import options
from polylens.cli.console import ProgressBars, duration, out, print_json, size, table
from polylens.config import load_config
from polylens.errors import UsageError
from polylens.journal import versions
from polylens.machine import matmul_flops
from polylens.models.loading import choose_device
from polylens.plan import Plan, make_plan


def doctor(
    arguments: options.ConfigAndOverrides = None,
    model: options.Model = None,
    languages: options.Languages = None,
    device: options.Device = "auto",
    memory: options.Memory = None,
    offline: options.Offline = False,
    as_json: options.AsJson = False,
) -> None:
    """Print environment, devices and cache; with languages, what a run would cost.

    **Examples**

        polylens doctor

        polylens doctor --model qwen2.5-coder-1.5b-instruct --languages zh,sw
    """
    facts = environment(device)
    path, overrides = options.split_arguments(arguments)
    overrides.update({k: v for k, v in (("model", model), ("languages", languages)) if v})
    cost = None
    if path is not None or "languages" in overrides:
        config = load_config(path, overrides)
        runtime = options.make_runtime(device=device, memory=memory, offline=offline)
        with ProgressBars(shown=not as_json) as progress:
            plan = make_plan(config, runtime, progress)
        facts["run"] = cost = forecast(plan)
    elif overrides:
        raise UsageError(
            "the cost of a run needs its languages; add --languages, e.g. --languages sw,bn"
        )
    if as_json:
        print_json(facts)
        return
    table(
        None,
        ["environment", ""],
        [[name, str(value)] for name, value in facts.items() if name != "run"],
    )
    if cost is not None:
        out.print()
        table(
            None,
            ["the run", ""],
            forecast_rows(plan, cost),
        )


def forecast(plan: Plan) -> dict[str, Any]:
    """Return what a run would cost on this machine, of which the speed is measured."""
    flops = plan.cost.trunk_flops + plan.cost.crown_flops
    rate = matmul_flops(plan.execution.device, plan.execution.dtype)
    return {
        "model": plan.source.name,
        "parameters": plan.facts.n_parameters,
        "flops": flops,
        "seconds": flops / rate,
        "measured_flops_per_second": rate,
        "memory_bytes": plan.cost.memory_bytes,
        "disk_bytes": plan.cost.disk_bytes,
        "streamed": plan.execution.streamed,
        "dtype": plan.execution.computing_name,
    }


def forecast_rows(plan: Plan, cost: Mapping[str, Any]) -> list[list[str]]:
    """Return a forecast in words: pairs of what and how much."""
    return [
        ["model", f"{cost['model']}, {cost['parameters'] / 1e6:,.0f} M parameters"],
        [
            "probing, training",
            f"{cost['flops'] / 1e12:,.1f} TFLOP, about {duration(cost['seconds'])} here",
        ],
        ["answers", "not counted: they depend on what the model says"],
        [
            "memory",
            f"about {size(cost['memory_bytes'])} of {size(psutil.virtual_memory().total)}",
        ],
        ["run on", plan.execution.sentence()],
        ["disk", f"about {size(cost['disk_bytes'])}"],
    ]


def environment(device: str) -> dict[str, Any]:
    """Return what a bug report needs to know about this machine."""
    chosen = choose_device(device)
    cache = cache_folder()
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    facts: dict[str, Any] = {
        **versions(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": size(psutil.virtual_memory().total),
        "memory free": size(psutil.virtual_memory().available),
        "device": str(chosen),
    }
    if chosen.type == "cuda":
        facts["device name"] = torch.cuda.get_device_name(chosen)
    facts["cache"] = str(cache)
    facts["cache holds"] = size(_folder_bytes(cache))
    facts["disk free"] = size(shutil.disk_usage(place).free)
    return facts


def _folder_bytes(folder: Path) -> int:
    if not folder.exists():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
