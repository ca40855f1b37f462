"""`polylens doctor`: what this machine has, and what a run would cost here."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from polylens.cache import cache_folder
from polylens.cli import options
from polylens.cli.console import ProgressBars, duration, out, print_json, size, table
from polylens.config import RunConfig, Runtime, load_config
from polylens.errors import UsageError
from polylens.execution import load_as_planned
from polylens.forecast import Signs, forecast_gain, measure_signs
from polylens.journal import versions
from polylens.languages import language_name
from polylens.machine import matmul_flops
from polylens.models.loading import choose_device
from polylens.plan import Plan, choose_rows, make_plan
from polylens.progress import Progress
from polylens.training import state_layers


def doctor(
    arguments: options.ConfigAndOverrides = None,
    model: options.Model = None,
    languages: options.Languages = None,
    with_forecast: Annotated[
        bool,
        typer.Option(
            "--forecast",
            help="Load the model, and say what a run is likely to bring each language.",
        ),
    ] = False,
    device: options.Device = "auto",
    memory: options.Memory = None,
    offline: options.Offline = False,
    as_json: options.AsJson = False,
) -> None:
    """Print environment, devices and cache; with languages, what a run would cost.

    **Examples**

        polylens doctor

        polylens doctor --model qwen2.5-coder-1.5b-instruct --languages zh,sw

        polylens doctor --model qwen2.5-coder-1.5b-instruct --languages zh,sw --forecast
    """
    facts = environment(device)
    path, overrides = options.split_arguments(arguments)
    overrides.update({k: v for k, v in (("model", model), ("languages", languages)) if v})
    cost = signs = None
    if path is not None or "languages" in overrides:
        config = load_config(path, overrides)
        runtime = options.make_runtime(device=device, memory=memory, offline=offline)
        with ProgressBars(shown=not as_json) as progress:
            plan = make_plan(config, runtime, progress)
            if with_forecast:
                signs = _signs(config, runtime, plan, progress)
                facts["forecast"] = _as_rows(signs, config.central)
        facts["run"] = cost = cost_of(plan)
    elif overrides or with_forecast:
        raise UsageError(
            "the cost of a run, and its forecast, need its languages; add --languages, e.g. "
            "--languages sw,bn"
        )
    if as_json:
        print_json(facts)
        return
    table(
        None,
        ["environment", ""],
        [[name, str(value)] for name, value in facts.items() if name not in ("run", "forecast")],
    )
    if cost is not None:
        out.print()
        table(
            None,
            ["the run", ""],
            cost_rows(plan, cost),
        )
    if signs is not None:
        _print_forecast(signs, config.central)


def _signs(config: RunConfig, runtime: Runtime, plan: Plan, progress: Progress) -> dict[str, Signs]:
    """Load the model and measure its signs, on rows that the run would train on."""
    model = load_as_planned(config.model, plan.execution, runtime, config.revision, progress)
    return measure_signs(
        model,
        choose_rows(config, offline=runtime.offline)[0],
        central=config.central,
        languages=config.languages,
        layer=max(state_layers(config.train, plan.facts.n_layers)),
        template=config.template,
        max_tokens=config.train.max_tokens,
        token_budget=runtime.token_budget,
        scratch=plan.execution.scratch(),
        progress=progress,
    )


def _as_rows(signs: Mapping[str, Signs], central: str) -> dict[str, dict[str, Any]]:
    """All signs by language, and of the targets what they say."""
    return {
        language: dataclasses.asdict(own)
        | ({} if language == central else dataclasses.asdict(forecast_gain(own, central)))
        for language, own in signs.items()
    }


def _print_forecast(signs: Mapping[str, Signs], central: str) -> None:
    out.print()
    table(
        None,
        [
            "signs",
            "told apart",
            f"from {central}, spreads",
            "tokens a word",
            f"× {central}",
            "bits per byte",
            f"bits × {central}",
            "of replies",
            "answers in it",
            "repeating",
        ],
        [
            [
                f"{language_name(language)} ({language})",
                f"{own.separability:.0%}",
                f"{own.distance:.1f}",
                f"{own.tokens_per_word:.1f}",
                f"{own.relative_tokens:.1f}",
                f"{own.bits_per_byte:.2f}",
                f"{own.relative_bits:.1f}",
                f"{own.reply_bits_per_byte:.2f}",
                f"{own.fidelity * own.n_answers:.0f} of {own.n_answers}",
                f"{own.repeating * own.n_answers:.0f}",
            ]
            for language, own in signs.items()
        ],
    )
    out.print()
    for language, own in signs.items():
        if language != central:
            sentence = forecast_gain(own, central).sentence
            out.print(f"  {language_name(language)}: {sentence}.", highlight=False, markup=False)
    out.print('\n  The rules, and how far to trust them: docs/runs.md, "Will it work?"')


def cost_of(plan: Plan) -> dict[str, Any]:
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


def cost_rows(plan: Plan, cost: Mapping[str, Any]) -> list[list[str]]:
    """Return a cost in words: pairs of what and how much."""
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
