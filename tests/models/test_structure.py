"""Taking a model apart and running it layer by layer gives what the model itself gives."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from polylens.errors import ModelError
from polylens.models.loading import LanguageModel
from polylens.models.structure import Calls, find_structure
from tiny import N_LAYERS

IDS = torch.arange(5, 29).reshape(2, 12)


def test_layer_by_layer_equals_the_whole_model(tiny_model: LanguageModel) -> None:
    structure = tiny_model.structure
    with torch.no_grad():
        inputs = structure.layer_inputs(IDS)
        states = inputs.hidden_states
        outputs = []
        for index, layer in enumerate(structure.layers):
            states = inputs.calls[index](layer, states)
            outputs.append(states)
        normed = structure.final_norm(states)
        logits = structure.logits(normed)
        expected = tiny_model.causal_lm(IDS, use_cache=False, output_hidden_states=True)
    # transformers shifts by one, and its last entry has passed the final norm.
    for index in range(N_LAYERS - 1):
        torch.testing.assert_close(outputs[index], expected.hidden_states[index + 1])
    torch.testing.assert_close(inputs.hidden_states, expected.hidden_states[0])
    torch.testing.assert_close(normed, expected.hidden_states[-1])
    torch.testing.assert_close(logits, expected.logits)


def test_calls_do_not_depend_on_the_tokens(tiny_model: LanguageModel) -> None:
    structure = tiny_model.structure
    with torch.no_grad():
        inputs = structure.layer_inputs(IDS)
        calls = Calls(structure).of_batch(*IDS.shape)
        for call, other in zip(calls, inputs.calls, strict=True):
            layer = structure.layers[0]
            a, b = call(layer, inputs.hidden_states), other(layer, inputs.hidden_states)
            assert torch.equal(a, b)


def test_finding_the_structure_leaves_the_model_as_it_was(tiny_model: LanguageModel) -> None:
    model = tiny_model.causal_lm
    with torch.no_grad():
        before = model(IDS).logits
        find_structure(model)
        tiny_model.structure.logits(torch.randn(1, 3, tiny_model.structure.hidden_size))
        after = model(IDS).logits
    assert torch.equal(before, after)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_encoder_is_refused() -> None:
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(ModelError, match="decoder-only"):
        _refuse(BertForMaskedLM(config))


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(ModelError, match="decoder-only"):
        _refuse(T5ForConditionalGeneration(config))


def test_layers_that_look_at_the_tokens_again_are_refused() -> None:
    config = Zamba2Config(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        layers_block_type=["mamba", "hybrid"],
        num_attention_heads=2,
        intermediate_size=16,
        n_mamba_heads=4,
        mamba_d_state=4,
        adapter_rank=2,
    )
    with pytest.raises(ModelError, match="positions and masks alone"):
        find_structure(Zamba2ForCausalLM(config))


def _refuse(model: torch.nn.Module) -> None:
    find_structure(model)  # type: ignore[arg-type]
