"""The trunk pass equals the whole model's forward, whatever the batch, the padding and the cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polylens.crown import run_crown
from polylens.hidden_states import Keep, collect_hidden_states, pad_right, pool, token_batches
from polylens.models.loading import LanguageModel
from tiny import N_LAYERS

PROMPTS = [[5, 9, 30, 12, 7, 80, 41, 6], [7, 8], [11, 60, 33, 20, 19], [90], [4, 5, 6, 7, 8, 9, 10]]


def _alone(model: LanguageModel, ids: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Layer outputs and normed output of one unpadded prompt, from transformers' own forward."""
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _module, _args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in model.structure.layers
    ]
    with torch.no_grad():
        last = model.causal_lm(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return [output[0] for output in outputs], last.hidden_states[-1][0]


@pytest.mark.parametrize("token_budget", [1, 16, 1000])
def test_states_equal_those_of_each_prompt_alone(
    tiny_model: LanguageModel, token_budget: int
) -> None:
    states = collect_hidden_states(
        tiny_model.structure,
        PROMPTS,
        Keep(pooling="last", boundary_layer=2, final=True),
        token_budget=token_budget,
    )
    for index, ids in enumerate(PROMPTS):
        outputs, normed = _alone(tiny_model, ids)
        tokens = slice(states.offsets[index], states.offsets[index + 1])
        _close(states.boundary[tokens], outputs[1])
        _close(states.final[tokens], outputs[-1])
        for layer in range(N_LAYERS):
            _close(states.pooled[index, layer], outputs[layer][-1])
        _close(states.pooled[index, N_LAYERS], normed[-1])


@pytest.mark.parametrize("cut", range(N_LAYERS + 1))
def test_trunk_then_crown_equals_the_whole(tiny_model: LanguageModel, cut: int) -> None:
    structure = tiny_model.structure
    states = collect_hidden_states(structure, PROMPTS, Keep(boundary_layer=cut), token_budget=16)
    for rows, output, lengths in run_crown(structure, states, token_budget=9):
        for row, index in enumerate(rows):
            outputs, _ = _alone(tiny_model, PROMPTS[index])
            _close(output[row, : lengths[row]], outputs[-1])


def test_mean_pooling_is_over_real_tokens(tiny_model: LanguageModel) -> None:
    states = collect_hidden_states(tiny_model.structure, PROMPTS, Keep(pooling="mean"))
    for index, ids in enumerate(PROMPTS):
        outputs, normed = _alone(tiny_model, ids)
        _close(states.pooled[index, 1], outputs[1].mean(0))
        _close(states.pooled[index, N_LAYERS], normed.mean(0))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    token_budget=st.integers(1, 100),
)
def test_batches_hold_every_prompt_once_within_the_budget(
    lengths: list[int], token_budget: int
) -> None:
    batches = list(token_batches(lengths, token_budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= token_budget or len(batch) == 1


def test_pool_by_hand() -> None:
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]]])
    lengths = torch.tensor([2])
    assert pool(states, lengths, "last").tolist() == [[3.0, 4.0]]
    assert pool(states, lengths, "mean").tolist() == [[2.0, 3.0]]


def test_pads_never_spread_even_if_they_are_not_finite() -> None:
    states = torch.tensor([[[1.0], [torch.nan]]])
    assert pool(states, torch.tensor([1]), "mean").tolist() == [[1.0]]
    assert pad_right([[1, 2], [3]]).tolist() == [[1, 2], [3, 0]]


def _close(actual: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert actual is not None
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
