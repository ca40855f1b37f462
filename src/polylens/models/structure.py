"""A decoder-only model taken apart: embeddings, decoder layers, final norm, head.

The parts are found from the model's own structure, not from a list of names: the decoder layers are
the outermost `ModuleList` as long as `config.num_hidden_layers`, and what the model does before and
after them is learnt by running its own forward with the layers replaced by recorders. So scaled
embeddings, rotary tables, sliding windows and soft capped logits come out as the model defines
them. Start with `find_structure`.

Layer convention of the whole package: decoder layers count from 0, and the *output* of layer k is
entry k of every per-layer array. One entry follows, `n_layers`: the last layer's output after the
final norm. (transformers shifts by
one: its `hidden_states[0]` is the embedding, `hidden_states[k + 1]` the output of layer k, except
    that its last entry
has passed the final norm.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polylens.errors import ModelError


@dataclass(frozen=True)
class LayerCall:
    """What a model passes to a decoder layer beside the hidden states: positions, masks."""

    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """Run `layer` on hidden states of (batch, seq_len, hidden_size); same shape out."""
        output = layer(hidden_states, *self.args, **self.keywords)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states


@dataclass(frozen=True)
class LayerInputs:
    """What the decoder layers receive for one batch.

    Attributes:
        hidden_states: (batch, seq_len, hidden_size), the input of layer 0: embeddings, scaled as
            the model does.
        calls: for each layer, what its model passes to it beside the hidden states.
    """

    hidden_states: Tensor
    calls: tuple[LayerCall, ...]


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes what it is called with, and returns its input."""

    def __init__(self, layer: nn.Module, calls: list[tuple[Tensor, LayerCall]]) -> None:
        super().__init__()
        object.__setattr__(self, "_recorded_layer", layer)  # hidden from nn.Module: not our child
        object.__setattr__(self, "_calls", calls)

    def __getattr__(
        self, name: str
    ) -> Any:  # e.g. `attention_type`, which some models read off their layers
        return getattr(object.__getattribute__(self, "_recorded_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Tensor:
        self._calls.append((hidden_states, LayerCall(args, keywords)))
        return hidden_states


class _DecoderOutput:
    """What a head reads of a decoder's output: the states, and None for every other field."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


class _Given(nn.Module):
    """Stands in for the decoder inside a causal LM: returns the states it was built with."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self._hidden_states = hidden_states

    def forward(self, *args: Any, **keywords: Any) -> _DecoderOutput:
        return _DecoderOutput(self._hidden_states)


@dataclass(frozen=True)
class DecoderStructure:
    """The parts of a decoder-only language model, and how to run them one by one.

    Attributes:
        causal_lm: the whole model, head included.
        decoder: the module whose forward runs embeddings, layers and final norm.
        layers_path: name of the layers' `ModuleList` within `causal_lm`, e.g. "model.layers".
        final_norm: the module applied after the last layer; `nn.Identity` where there is none.
        n_layers: number of decoder layers.
        hidden_size: width of the residual stream.
    """

    causal_lm: PreTrainedModel
    decoder: nn.Module
    layers_path: str
    final_norm: nn.Module
    n_layers: int
    hidden_size: int

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        found = self.causal_lm.get_submodule(self.layers_path)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.causal_lm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return next(self.layers.parameters()).dtype

    def parameter_name(self, layer: int, name: str) -> str:
        """Name within `causal_lm` of parameter `name` of decoder layer `layer`."""
        return f"{self.layers_path}.{layer}.{name}"

    def layer_inputs(self, input_ids: Tensor) -> LayerInputs:
        """Run everything before the decoder layers.

        No attention mask is passed: with right padding and causal attention, pads never reach real
        tokens.

        Args:
            input_ids: (batch, seq_len) int64, padded on the right with any valid id.
        """
        return _enter(self.decoder, self.layers_path.rpartition(".")[2], input_ids)

    def calls_for(self, batch_size: int, seq_len: int) -> tuple[LayerCall, ...]:
        """What every decoder layer receives for a batch of this shape, whatever its tokens."""
        with torch.no_grad():
            ids = torch.zeros(batch_size, seq_len, dtype=torch.int64, device=self.device)
            return self.layer_inputs(ids).calls

    def logits(self, normed: Tensor) -> Tensor:
        """Apply the model's own head, with whatever scaling or soft capping it does.

        Args:
            normed: (batch, seq_len, hidden_size), states after the final norm.

        Returns:
            (batch, seq_len, vocab_size).
        """
        head = _shallow_copy(self.causal_lm)
        path = self.layers_path.rpartition(".")[0]  # "model", or "model.decoder", …
        owner: nn.Module = head
        *parents, name = path.split(".")
        for parent in parents:
            inner = _shallow_copy(owner._modules[parent])
            owner._modules[parent] = inner
            owner = inner
        owner._modules[name] = _Given(normed)
        ids = torch.zeros(normed.shape[:2], dtype=torch.int64, device=normed.device)
        output: Tensor = head(input_ids=ids, use_cache=False).logits
        return output


def find_structure(model: PreTrainedModel) -> DecoderStructure:
    """Find embeddings, decoder layers, final norm and head of a causal language model.

    Args:
        model: a transformers causal LM; its weights are not changed.

    Raises:
        ModelError: the model is not a decoder-only language model of a shape we can run layer by
            layer.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ModelError(
            "the model must be a decoder-only language model with an LM head, got "
            f"{type(model).__name__}; choose a model that AutoModelForCausalLM loads"
        )
    n_layers = int(config.num_hidden_layers)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and "." in name
    ]
    inside_decoder = [name for name in lists if _owner(model, name) is model.get_decoder()]
    candidates = inside_decoder or sorted(lists, key=lambda name: name.count("."))
    if not candidates:
        raise ModelError(
            f"the model must keep its {n_layers} decoder layers in one ModuleList, but "
            f"{type(model).__name__} has none of that length; PolyLens does not support it"
        )
    layers_path = candidates[0]
    decoder = _owner(model, layers_path)
    attribute = layers_path.rpartition(".")[2]
    return DecoderStructure(
        causal_lm=model,
        decoder=decoder,
        layers_path=layers_path,
        final_norm=_find_final_norm(decoder, attribute, next(model.parameters()).device),
        n_layers=n_layers,
        hidden_size=int(config.hidden_size),
    )


def _owner(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _shallow_copy(module: Any) -> Any:
    """Copy a module without its parameters; its children can be swapped, the original stays."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def _enter(decoder: nn.Module, attribute: str, input_ids: Tensor) -> LayerInputs:
    """Run `decoder`'s own forward with recorders in the place of its layers."""
    skeleton = _shallow_copy(decoder)
    calls: list[tuple[Tensor, LayerCall]] = []
    layers: Sequence[nn.Module] = decoder._modules[attribute]  # type: ignore[assignment]
    skeleton._modules[attribute] = nn.ModuleList(_Recorder(layer, calls) for layer in layers)
    skeleton(input_ids=input_ids, use_cache=False)
    if len(calls) != len(layers):
        raise ModelError(
            f"the model must run each of its {len(layers)} decoder layers once, but ran "
            f"{len(calls)}; PolyLens does not support this architecture"
        )
    return LayerInputs(calls[0][0], tuple(call for _, call in calls))


def _find_final_norm(decoder: nn.Module, attribute: str, device: torch.device) -> nn.Module:
    """Return the last child to run after the layers; learnt by watching a tiny forward."""
    order: list[nn.Module] = []
    layers: Sequence[nn.Module] = decoder._modules[attribute]  # type: ignore[assignment]
    hooks = [
        child.register_forward_hook(lambda module, *_: order.append(module))
        for name, child in decoder.named_children()
        if name != attribute
    ]
    skeleton = _shallow_copy(decoder)
    calls: list[tuple[Tensor, LayerCall]] = []

    class _Mark(_Recorder):
        def forward(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Tensor:
            order.clear()  # keep only what runs after the last layer
            return super().forward(hidden_states, *args, **keywords)

    skeleton._modules[attribute] = nn.ModuleList(_Mark(layer, calls) for layer in layers)
    try:
        with torch.no_grad():
            skeleton(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(order) > 1:
        names = ", ".join(type(module).__name__ for module in order)
        raise ModelError(
            f"the model must apply one final norm after its decoder layers, but applies {names}; "
            "PolyLens does not support this architecture"
        )
    return order[0] if order else nn.Identity()
