"""What is measured on the machine is measured once, and short work is not held up by it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from polylens import machine, token_budget
from polylens.cache import cache_folder
from polylens.machine import computing_dtype, keeping_freed_memory, matmul_flops
from polylens.memory import PeakMemory, own_memory_bytes
from polylens.models.loading import LanguageModel
from polylens.scratch import Scratch
from polylens.token_budget import best_token_budget

CPU = torch.device("cpu")


def test_a_short_pass_is_not_held_up_by_measuring(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_budget, "_layer_rate", lambda *_: pytest.fail("measured"))
    assert best_token_budget(llama.structure, 1000) == 1024


def test_the_smallest_good_batch_is_taken_and_remembered(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {512: 50.0, 1024: 96.0, 2048: 100.0, 4096: 60.0}
    asked: list[int] = []

    def rate(structure: object, n_tokens: int) -> float:
        asked.append(n_tokens)
        return rates[n_tokens]

    monkeypatch.setattr(token_budget, "_layer_rate", rate)
    assert best_token_budget(llama.structure, 10**9) == 1024
    assert best_token_budget(llama.structure, 10**9) == 1024
    assert asked == [512, 1024, 2048, 4096]


def test_measuring_really_runs_a_layer(llama: LanguageModel) -> None:
    assert best_token_budget(llama.structure, 10**9) in (512, 1024, 2048, 4096)
    (key,) = json.loads((cache_folder() / "machine.json").read_text())
    assert "token budget" in key


def test_little_memory_means_small_batches(llama: LanguageModel) -> None:
    assert best_token_budget(llama.structure, 10**9, batch_bytes=10) == 512


@pytest.mark.parametrize(("speedup", "expected"), [(3.0, torch.bfloat16), (1.2, torch.float32)])
def test_a_narrow_dtype_must_be_worth_its_rounding(
    speedup: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flops(device: torch.device, dtype: torch.dtype, *, seconds: float) -> float:
        return 1.0 if dtype == torch.float32 else speedup

    monkeypatch.setattr(machine, "matmul_flops", flops)
    assert computing_dtype(torch.bfloat16, CPU) == expected
    assert computing_dtype(torch.float32, CPU) == torch.float32
    assert computing_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_a_damaged_memory_of_the_machine_is_made_again() -> None:
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / "machine.json").write_text("{")
    assert machine.remembered("answer", lambda: 42) == 42
    assert machine.remembered("answer", lambda: 43) == 42


def test_the_rate_of_matrix_products_is_a_rate() -> None:
    assert 1e8 < matmul_flops(CPU, seconds=0.01) < 1e15


def test_freed_memory_is_kept_and_then_given_back() -> None:
    def grow() -> None:
        blocks = [torch.ones(2**22) for _ in range(8)]  # 128 MiB
        del blocks

    grow()
    with keeping_freed_memory(), keeping_freed_memory():
        grow()
        kept = own_memory_bytes()
    assert own_memory_bytes() < kept - 2**26


def test_the_peak_of_the_own_memory_leaves_mapped_files_out(tmp_path: Path) -> None:
    with PeakMemory() as peak:
        mapped = Scratch(0, tmp_path).zeros((2**26,), torch.float32)  # 256 MiB in a file
        time.sleep(0.2)
    before = own_memory_bytes()
    assert mapped.sum() == 0
    assert peak.bytes < before + 2**26
    with PeakMemory() as peak:
        block = torch.ones(2**25)  # 128 MiB
        time.sleep(0.2)
    assert peak.bytes > before + 2**26
    assert len(block)
