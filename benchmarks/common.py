"""What the parts of the benchmark share: data, prompts, the machine's rate, results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from polylens import load_model, read_parallel, read_texts, starter_corpus
from polylens.hidden_states import HiddenStates
from polylens.journal import versions
from polylens.machine import device_name, keeping_freed_memory, matmul_flops
from polylens.memory import PeakMemory
from polylens.models.loading import LanguageModel, choose_device
from polylens.prompts import ParallelPrompts, choose_format, encode_parallel, encode_texts

LANGUAGES = ("en", "zh", "ja", "ko", "ar", "sw", "bn")
RESULTS = Path(__file__).parent / "results"
DEVICE = choose_device("auto")


@dataclass(frozen=True)
class Data:
    """The corpora of a benchmark: the paper's, from a folder, or the starter corpus.

    Attributes:
        folder: with `probing_texts_7_languages.jsonl` and
            `parallel_instructions_7_languages.json`; None takes the starter corpus.
        share: 1 takes all, 5 every fifth text and row.
    """

    folder: Path | None
    share: int = 1

    @property
    def name(self) -> str:
        """What was read, in words."""
        what = "the starter corpus" if self.folder is None else "the paper's data"
        return what if self.share == 1 else f"one in {self.share} of {what}"

    def texts(self, model: LanguageModel, n: int = 300) -> dict[str, list[tuple[int, ...]]]:
        """Language → token ids of probing texts, `n` of the whole corpus at most."""
        if self.folder is None:
            corpus = starter_corpus().to_corpus()
        else:
            corpus = read_texts(str(self.folder / "probing_texts_7_languages.jsonl"), LANGUAGES)
        chosen = corpus.select(LANGUAGES, n // self.share, 0)
        form = choose_format(model.tokenizer)
        prompts = encode_texts(chosen, LANGUAGES, form, model.tokenizer, 64)
        return {language: list(found.ids) for language, found in prompts.items()}

    def rows(self, model: LanguageModel, n: int = 200) -> ParallelPrompts:
        """Parallel prompts, `n` rows of the whole corpus at most."""
        if self.folder is None:
            corpus = starter_corpus()
        else:
            corpus = read_parallel(str(self.folder / "parallel_instructions_7_languages.json"))
        chosen = corpus.select(LANGUAGES).limit(n // self.share, 0)
        form = choose_format(model.tokenizer)
        return encode_parallel(chosen, LANGUAGES, form, model.tokenizer, 128)


@dataclass
class Timing:
    """A timed piece of work.

    Attributes:
        seconds: it took.
        flops_per_second: of a matrix product just before and just after, averaged.
        peak_bytes: of the process's own memory.
    """

    seconds: float = 0.0
    flops_per_second: float = 0.0
    peak_bytes: int = 0
    rates: list[float] = field(default_factory=list)

    def over_floor(self, operations: float) -> float:
        """Return the time as a multiple of what the operations alone take."""
        return self.seconds * self.flops_per_second / operations


@contextmanager
def timed(dtype: torch.dtype = torch.float32) -> Iterator[Timing]:
    """Time what is done within, and measure the machine's rate in `dtype` around it."""
    timing = Timing()
    with keeping_freed_memory():
        timing.rates.append(matmul_flops(DEVICE, dtype))
    with PeakMemory() as peak:
        started = time.perf_counter()
        yield timing
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        timing.seconds = time.perf_counter() - started
    timing.peak_bytes = peak.bytes
    with keeping_freed_memory():
        timing.rates.append(matmul_flops(DEVICE, dtype))
    timing.flops_per_second = sum(timing.rates) / len(timing.rates)


def open_quietly(name: str, **how: Any) -> LanguageModel:
    """Load a model without transformers' bar."""
    transformers.utils.logging.disable_progress_bar()
    return load_model(name, **how)


def layer_parameters(model: LanguageModel) -> int:
    """Return the weights of one decoder layer."""
    return sum(p.numel() for p in model.structure.layers[0].parameters())


def by_language(states: HiddenStates, texts: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    """Take pooled states apart by language."""
    assert states.pooled is not None
    parts = states.pooled.split([len(found) for found in texts.values()])
    return dict(zip(texts, parts, strict=True))


def record(part: str, measured: dict[str, Any]) -> None:
    """Write a part's result, with the machine that it was measured on."""
    result = {
        **measured,
        "machine": device_name(DEVICE),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    (RESULTS / f"{part}.json").write_text(text, encoding="utf-8")


def repeat(n: int, work: Callable[[], Any]) -> list[float]:
    """Time `work` several times."""
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds
