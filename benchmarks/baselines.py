"""What Lens and its alternatives cost on the same rows: operations, seconds, memory, bytes.

Each method trains once in a process of its own, on the starter corpus's training rows in seven
languages, as if called by a user; then once more, while operations are counted (products of
attention's states aside, which the counter does not see on a CPU). Models are in memory, in
float32.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

import polylens
from common import LANGUAGES, open_quietly, record, timed
from polylens.baselines import LowRankSettings, fine_tune, pretrain
from polylens.baselines.supervised import translations
from polylens.config import PRESETS, TrainSettings
from polylens.corpora import ParallelCorpus
from polylens.crown import CrownDelta
from polylens.models.loading import LanguageModel
from polylens.subspaces import Subspaces

CENTRAL = LANGUAGES[0]
TARGETS: dict[str, Any] = {"languages": LANGUAGES[1:], "central": CENTRAL}


def steering(model: LanguageModel, rows: ParallelCorpus) -> Subspaces:
    """Find the directions, which is all that steering needs."""
    return polylens.probe(model, rows.to_corpus(), languages=LANGUAGES, central=CENTRAL)


def lens(model: LanguageModel, rows: ParallelCorpus, preset: str, **given: Any) -> CrownDelta:
    """Probe, ask where the preset does, and train."""
    settings = TrainSettings(**{**PRESETS[preset]["train"], **given})
    return polylens.train(model, steering(model, rows), rows, settings=settings)


METHODS: dict[str, Callable[[LanguageModel, ParallelCorpus], Subspaces | CrownDelta]] = {
    "steering": steering,
    "paper": partial(lens, preset="paper"),
    "default": partial(lens, preset="default"),
    "default, strength=1": partial(lens, preset="default", strength=1.0),
    "answers": partial(lens, preset="answers"),
    "sft": lambda model, rows: fine_tune(model, rows.to_answered(), **TARGETS),
    "sft-lora": lambda model, rows: fine_tune(
        model, rows.to_answered(), settings=LowRankSettings(), **TARGETS
    ),
    "sft, translations": lambda model, rows: fine_tune(
        model, translations(rows, CENTRAL), **TARGETS
    ),
    "pretraining": lambda model, rows: pretrain(model, rows.to_corpus(), **TARGETS),
}


def run(name: str, share: int) -> None:
    """Measure and record; one in `share` rows."""
    measured = {}
    for method in METHODS:
        # A process each, so that none finds memory or pages of another.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            measured[method] = alone.submit(measure, name, method, share).result()
        print(method, measured[method], flush=True)
    result = {"model": name, "n_rows": len(_rows(share).rows), "methods": measured}
    record("baselines", result)
    print(table(result))


def measure(name: str, method: str, share: int) -> dict[str, float]:
    """Train, and train again with operations counted."""
    model, rows, train = open_quietly(name, dtype="float32"), _rows(share), METHODS[method]
    with timed() as timing:
        made = train(model, rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.safetensors"
        made.save(path)
        result_bytes = path.stat().st_size
    with FlopCounterMode(display=False) as counted:
        train(model, rows)
    return {
        "seconds": timing.seconds,
        "peak_bytes": timing.peak_bytes,
        "operations": counted.get_total_flops(),
        "result_bytes": result_bytes,
    }


def _rows(share: int) -> ParallelCorpus:
    corpus = polylens.starter_corpus().select(LANGUAGES)
    rows, _ = corpus.split(corpus.n_heldout)
    return rows.limit(len(rows.rows) // share, 0)


def table(result: dict[str, Any]) -> str:
    """Return the result as it stands in docs/performance.md."""
    lines = [
        "| method | operations, 10¹² | seconds | peak memory, GB | result, MB |",
        "|-|-|-|-|-|",
        *(
            f"| {method} | {one['operations'] / 1e12:.1f} | {one['seconds']:.0f} "
            f"| {one['peak_bytes'] / 1e9:.1f} | {one['result_bytes'] / 1e6:.1f} |"
            for method, one in result["methods"].items()
        ),
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"{result['model']}, {result['n_rows']} rows of the starter corpus in seven languages, "
            "float32.",
        ]
    )
