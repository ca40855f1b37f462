"""A delta: applied, dialled, saved, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polylens.artefacts import save_tensors
from polylens.crown import Crown, CrownDelta, run_crown
from polylens.errors import CorruptFileError, ModelError, UsageError
from polylens.hidden_states import Keep, collect_hidden_states, gather
from polylens.models.loading import LanguageModel, wrap_model
from polylens.models.structure import Calls
from tiny import N_LAYERS, build, tiny_tokenizer

IDS = torch.arange(5, 17)[None]


def random_delta(model: LanguageModel, scale: float = 0.1) -> CrownDelta:
    generator = torch.Generator().manual_seed(1)
    crown = Crown(model.structure, (N_LAYERS - 2, N_LAYERS - 1))
    changes = {
        name: scale * torch.randn(parameter.shape, generator=generator)
        for name, parameter in crown.named_trainable()
    }
    metadata = {"fingerprint": model.fingerprint, "model": model.name, "layers": crown.trainable}
    return CrownDelta(changes, metadata)


@torch.no_grad()
def logits(model: LanguageModel) -> torch.Tensor:
    return model.causal_lm(IDS, use_cache=False).logits


def test_strength_0_and_delta_0_are_the_untouched_model_bit_for_bit(
    tiny_model: LanguageModel,
) -> None:
    before = logits(tiny_model)
    with random_delta(tiny_model).applied(tiny_model.structure, 0.0):
        assert torch.equal(logits(tiny_model), before)
    with random_delta(tiny_model, scale=0.0).applied(tiny_model.structure):
        assert torch.equal(logits(tiny_model), before)


def test_a_delta_changes_the_model_and_leaves_it_bit_identical(tiny_model: LanguageModel) -> None:
    before, fingerprint = logits(tiny_model), tiny_model.fingerprint
    with pytest.raises(KeyboardInterrupt), random_delta(tiny_model).applied(tiny_model.structure):
        assert not torch.equal(logits(tiny_model), before)
        raise KeyboardInterrupt
    assert torch.equal(logits(tiny_model), before)
    same = wrap_model(tiny_model.causal_lm, tiny_model.tokenizer)
    assert same.fingerprint == fingerprint


def test_a_fresh_crown_runs_as_the_model_does(tiny_model: LanguageModel) -> None:
    crown = Crown(tiny_model.structure, (2, 3))
    states = collect_hidden_states(
        tiny_model.structure, IDS.tolist(), Keep(boundary_layers=(2,), final=True)
    )
    boundary, lengths = gather(states.boundary[2], states.offsets, [0])
    calls = Calls(tiny_model.structure)
    torch.testing.assert_close(crown(calls, boundary)[0].detach(), states.final)
    last = crown(calls, boundary, positions=lengths[:, None] - 1)[:, 0]
    torch.testing.assert_close(last[0].detach(), states.final[-1])
    assert not any(change.any() for change in crown.into_changes().values())


def test_a_delta_survives_saving(llama: LanguageModel, tmp_path: Path) -> None:
    delta = random_delta(llama)
    path = tmp_path / "delta.safetensors"
    delta.save(path)
    loaded = CrownDelta.load(path, fingerprint=llama.fingerprint)
    assert loaded.layers == (2, 3)
    assert loaded.changes.keys() == delta.changes.keys()
    assert all(torch.equal(loaded.changes[name], change) for name, change in delta.changes.items())


def test_a_delta_of_another_model_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    random_delta(llama).save(path)
    other = wrap_model(build("qwen2"), tiny_tokenizer())
    with pytest.raises(UsageError, match="belongs to another one"):
        CrownDelta.load(path, fingerprint=other.fingerprint)


def test_a_delta_that_does_not_fit_is_refused(llama: LanguageModel) -> None:
    delta = CrownDelta({"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}, {"layers": [9]})
    with pytest.raises(ModelError, match=r"layers\.9"):
        delta.weights(llama.structure)


def test_a_damaged_or_foreign_file_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    random_delta(llama).save(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="checksum"):
        CrownDelta.load(path)
    save_tensors(path, {"x": torch.zeros(1)}, {"kind": "something else"})
    with pytest.raises(UsageError, match="must hold a delta"):
        CrownDelta.load(path)


def test_the_fingerprint_does_not_depend_on_dtype_but_on_every_weight(
    llama: LanguageModel,
) -> None:
    narrow = wrap_model(build().bfloat16(), tiny_tokenizer())
    wide = wrap_model(build().bfloat16().float(), tiny_tokenizer())
    assert narrow.fingerprint == wide.fingerprint != llama.fingerprint
    changed = build()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert wrap_model(changed, tiny_tokenizer()).fingerprint != llama.fingerprint


@pytest.mark.parametrize("cut", [1, N_LAYERS - 1, N_LAYERS])
@pytest.mark.parametrize("n_last", [[1] * 4, [3, 1, 2, 4], [5, 8, 2, 1]])
def test_the_last_tokens_alone_are_those_of_the_whole(
    tiny_model: LanguageModel, cut: int, n_last: list[int]
) -> None:
    shared = [9, 11, 13, 15, 17]
    prompts = [[*shared, *own] for own in ([5, 6], [7, 8, 9, 10], [21], [5, 6, 7, 22, 23])]
    states = collect_hidden_states(tiny_model.structure, prompts, Keep(boundary_layers=(cut,)))
    whole = {
        index: output[row, : lengths[row]]
        for rows, output, lengths in run_crown(tiny_model.structure, states)
        for row, index in enumerate(rows)
    }
    for rows, output, wanted in run_crown(tiny_model.structure, states, n_last=n_last):
        for row, index in enumerate(rows):
            assert wanted[row] == n_last[index]
            ends = whole[index][-n_last[index] :]
            torch.testing.assert_close(output[row, : n_last[index]], ends, rtol=1e-4, atol=1e-5)
