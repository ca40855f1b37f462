"""The trunk pass equals the whole model's forward, whatever the batch, the padding and the cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polylens.crown import run_crown
from polylens.hidden_states import Keep, collect_hidden_states, pad_right, pool, token_batches
from polylens.models.loading import LanguageModel
from polylens.scratch import Scratch
from tiny import N_LAYERS

APART = [[5, 9, 30, 12, 7, 80, 41, 6], [7, 8], [11, 60, 33, 20, 19], [90], [4, 5, 6, 7, 8, 9, 10]]
PREFIX = [3, 50, 51, 52, 53, 54]  # longer than the sliding windows of the tiny models
# One occurs twice.
SHARING = [[*PREFIX, *ids] for ids in (*APART, APART[0])]


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


@pytest.fixture(params=[APART, SHARING], ids=["apart", "sharing"])
def prompts(request: pytest.FixtureRequest) -> list[list[int]]:
    """Prompts that begin differently, and prompts that begin alike."""
    found: list[list[int]] = request.param
    return found


def _n_shared(model: LanguageModel, prompts: list[list[int]]) -> int:
    """Tokens that are run once for all prompts; a convolution looks back otherwise."""
    return len(PREFIX) if prompts is SHARING and model.name != "lfm2" else 0


@pytest.mark.parametrize("token_budget", [1, 16, 1000])
def test_states_equal_those_of_each_prompt_alone(
    tiny_model: LanguageModel, prompts: list[list[int]], token_budget: int
) -> None:
    states = collect_hidden_states(
        tiny_model.structure,
        prompts,
        Keep(pooling="last", boundary_layers=(1, 2), final=True),
        token_budget=token_budget,
    )
    assert states.prefix_length == _n_shared(tiny_model, prompts)
    for index, ids in enumerate(prompts):
        outputs, normed = _alone(tiny_model, ids)
        _close(states.tokens(states.boundary[1], index), outputs[0])
        _close(states.tokens(states.boundary[2], index), outputs[1])
        _close(states.tokens(states.final, index), outputs[-1])
        for layer in range(N_LAYERS):
            _close(states.pooled[index, layer], outputs[layer][-1])
        _close(states.pooled[index, N_LAYERS], normed[-1])


@pytest.mark.parametrize("cut", range(N_LAYERS + 1))
def test_trunk_then_crown_equals_the_whole(
    tiny_model: LanguageModel, prompts: list[list[int]], cut: int
) -> None:
    structure = tiny_model.structure
    keep = Keep(boundary_layers=(cut,))
    states = collect_hidden_states(structure, prompts, keep, token_budget=16)
    for rows, output, lengths in run_crown(structure, states, token_budget=9):
        for row, index in enumerate(rows):
            outputs, _ = _alone(tiny_model, prompts[index])
            _close(output[row, : lengths[row]], outputs[-1])


def test_of_the_last_layer_only_the_last_tokens_are_run_where_no_others_are_read(
    tiny_model: LanguageModel, prompts: list[list[int]]
) -> None:
    structure = tiny_model.structure
    n_tokens: list[int] = []
    children = dict(structure.layers[-1].named_children())
    mlp = children.get("mlp") or children["feed_forward"]
    hook = mlp.register_forward_hook(lambda m, args, out: n_tokens.append(args[0][..., 0].numel()))
    assert structure.attention_name in ("self_attn", "attn", "self_attention")
    n_tokens.clear()
    states = collect_hidden_states(structure, prompts, Keep(pooling="last"))
    hook.remove()
    # Not those of all tokens, and no prompt twice.
    assert sum(n_tokens) == len(APART) + _n_shared(tiny_model, prompts)
    for index, ids in enumerate(prompts):
        outputs, normed = _alone(tiny_model, ids)
        _close(states.pooled[index, N_LAYERS - 1], outputs[-1][-1])
        _close(states.pooled[index, N_LAYERS], normed[-1])


def test_states_past_the_budget_lie_in_files_that_leave_nothing_behind(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polylens.scratch._SMALL_BYTES", 0)
    keep = Keep(pooling="mean", boundary_layers=(2,), final=True)
    expected = collect_hidden_states(llama.structure, SHARING, keep)
    scratch = Scratch(budget_bytes=100, folder=tmp_path)
    states = collect_hidden_states(llama.structure, SHARING, keep, scratch=scratch)
    assert scratch.spilled_bytes > 0
    assert scratch.used_bytes <= 100
    assert not list(tmp_path.iterdir())
    assert torch.equal(states.pooled, expected.pooled)
    assert torch.equal(states.boundary[2], expected.boundary[2])
    assert torch.equal(states.final, expected.final)


def test_mean_pooling_is_over_real_tokens(
    tiny_model: LanguageModel, prompts: list[list[int]]
) -> None:
    states = collect_hidden_states(tiny_model.structure, prompts, Keep(pooling="mean"))
    for index, ids in enumerate(prompts):
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
