"""LoRA adapters: PEFT loads them, they do what the delta does, and their error is as stated."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from polylens.artefacts import load_tensors
from polylens.errors import UsageError
from polylens.export import save_lora
from polylens.models.loading import LanguageModel, wrap_model
from test_crown import IDS, random_delta
from tiny import build, tiny_tokenizer


@torch.no_grad()
def logits(causal_lm: nn.Module) -> torch.Tensor:
    return causal_lm(IDS, use_cache=False).logits


def with_adapter(causal_lm: nn.Module, folder: Path) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(copy.deepcopy(causal_lm), folder)


def test_at_full_rank_peft_gives_the_logits_of_the_delta(
    tiny_model: LanguageModel, tmp_path: Path
) -> None:
    delta = random_delta(tiny_model)
    exported = save_lora(tiny_model, delta, tmp_path / "adapter", keep=1, strength=0.7)
    assert exported.error < 1e-6
    assert not exported.left
    adapted = with_adapter(tiny_model.causal_lm, tmp_path / "adapter")
    with delta.applied(tiny_model.structure, 0.7):
        wanted = logits(tiny_model.causal_lm)
    assert (wanted - logits(tiny_model.causal_lm)).abs().max() > 0.1
    torch.testing.assert_close(logits(adapted), wanted, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("matrices_only", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_stated_error_is_that_of_the_weights_peft_merges(
    name: str, rank: int, matrices_only: bool, tmp_path: Path
) -> None:
    model = wrap_model(build(name), tiny_tokenizer(), name)
    delta = random_delta(model)
    exported = save_lora(model, delta, tmp_path / "adapter", rank=rank, matrices_only=matrices_only)
    merged = with_adapter(model.causal_lm, tmp_path / "adapter").merge_and_unload()
    before, after = dict(model.causal_lm.named_parameters()), dict(merged.named_parameters())
    wrong = total = 0.0
    for weight, change in delta.changes.items():
        found = (after[weight] - before[weight]).detach()
        wrong += float((found - change).square().sum())
        total += float(change.square().sum())
    assert exported.error == pytest.approx((wrong / total) ** 0.5, rel=1e-3)
    assert bool(exported.left) == matrices_only
    assert set(exported.left) | set(exported.carried) == {
        weight for weight, change in delta.changes.items() if change.ndim == 1
    }
    if rank < exported.full_rank:  # no approximation of this rank is better
        best = sum(
            torch.linalg.svdvals(change.double())[rank:].square().sum()
            for change in delta.changes.values()
            if change.ndim == 2
        )
        rest = sum(delta.changes[weight].double().square().sum() for weight in exported.left)
        assert exported.error == pytest.approx(float(((best + rest) / total) ** 0.5), rel=1e-4)


def test_the_smallest_rank_that_keeps_the_share_is_taken(
    llama: LanguageModel, tmp_path: Path
) -> None:
    delta = random_delta(llama)
    generator = torch.Generator().manual_seed(2)
    for name, change in delta.changes.items():  # rank 3, and no change that is not a matrix
        if change.ndim == 2:
            left = torch.randn(change.shape[0], 3, generator=generator)
            change.copy_(left @ torch.randn(3, change.shape[1], generator=generator))
        else:
            assert name.endswith("layernorm.weight")
            change.zero_()
    assert save_lora(llama, delta, tmp_path / "a", keep=0.999999).rank == 3
    found = save_lora(llama, delta, tmp_path / "b", keep=0.8)
    assert 1 - found.errors[found.rank] ** 2 >= 0.8
    assert found.rank == 1 or 1 - found.errors[found.rank - 1] ** 2 < 0.8


def test_an_adapter_says_what_it_lacks(llama: LanguageModel, tmp_path: Path) -> None:
    exported = save_lora(llama, random_delta(llama), tmp_path / "a", rank=2, matrices_only=True)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    tensors, metadata = load_tensors(tmp_path / "a/adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert metadata["left_out"] == list(exported.left)
    assert metadata["error"] == exported.error == metadata["error_by_rank"]["2"]
    assert metadata["error_by_rank"]["32"] > 0  # the norms are missing at full rank too


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 33}, "rank must be between 1 and 32"),
        ({"rank": 0}, "rank must be between 1 and 32"),
        ({"keep": 1.5}, "keep must be above 0 and at most 1"),
        ({"keep": 1.0, "matrices_only": True}, "keep must be at most 0.9"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    llama: LanguageModel, tmp_path: Path, options: dict[str, float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        save_lora(llama, random_delta(llama), tmp_path / "adapter", **options)
    assert not list(tmp_path.iterdir())
