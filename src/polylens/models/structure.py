"""A decoder-only model taken apart: embeddings, decoder layers, final norm, head.

The parts are found from the model's own structure, not from a list of names: the decoder layers are
the outermost `ModuleList` as long as `config.num_hidden_layers`, and what the model does before and
after them is learnt by running its own forward with the layers replaced by recorders. So scaled
embeddings, rotary tables, sliding windows and soft capped logits come out as the model defines
them. Start with `find_structure`.

Layer convention of the whole package: decoder layers count from 0, and the *output* of layer k is
entry k of every per-layer array. One entry follows, `n_layers`: the last layer's output after the
final norm. (transformers shifts by one: its `hidden_states[0]` is the embedding,
`hidden_states[k + 1]` the output of layer k, except that its last entry has passed the final norm.)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from polylens.errors import ModelError
from polylens.models.shared_prefix import SharedPrefix
from polylens.models.streaming import (
    Streaming,
    loading_itself,
    materialized,
    place_small_parts,
    read_ahead,
    used_rows,
    with_rows,
)

# Shapes of batches whose calls are kept; beyond, they are worked out anew, which costs
# milliseconds.
_MAX_SHAPES = 256


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


class Calls:
    """What the layers receive for batches of a corpus, worked out once a shape.

    Attributes:
        device: where the model computes.
        prefix: the shared prefix of the corpus; None for none.
    """

    def __init__(self, structure: DecoderStructure, prefix_length: int = 0) -> None:
        for forget in structure.on_pass:
            forget()
        self._structure = structure
        self.device = structure.device
        self.prefix = SharedPrefix(structure.n_layers, prefix_length) if prefix_length else None
        self._known: dict[tuple[int, int, bool], tuple[LayerCall, ...]] = {}

    def of_prefix(self) -> tuple[LayerCall, ...]:
        """For the prefix, as a batch of one; running it notes its keys and values."""
        assert self.prefix is not None
        return self._of(1, self.prefix.length, True)

    def of_batch(self, batch_size: int, seq_len: int) -> tuple[LayerCall, ...]:
        """For what follows the prefix: (batch_size, seq_len) tokens padded on the right."""
        return self._of(batch_size, seq_len, False)

    def _of(self, batch_size: int, seq_len: int, is_prefix: bool) -> tuple[LayerCall, ...]:
        key = (batch_size, seq_len, is_prefix)
        if key in self._known:
            return self._known[key]
        cache = None
        if self.prefix is not None:
            cache = self.prefix.recording if is_prefix else self.prefix.extending
        with torch.no_grad():
            ids = torch.zeros(batch_size, seq_len, dtype=torch.int64)
            calls = self._structure.layer_inputs(ids, cache).calls
        if len(self._known) < _MAX_SHAPES:
            self._known[key] = calls
        return calls


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

    def __init__(
        self, layer: nn.Module, calls: list[tuple[Tensor, LayerCall]], in_tuple: bool
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_recorded_layer", layer)  # hidden from nn.Module: not our child
        object.__setattr__(self, "_calls", calls)
        self._in_tuple = in_tuple

    def __getattr__(
        self, name: str
    ) -> Any:  # e.g. `attention_type`, which some models read off their layers
        return getattr(object.__getattribute__(self, "_recorded_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
        self._calls.append((hidden_states, LayerCall(args, keywords)))
        return (hidden_states,) if self._in_tuple else hidden_states


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

    def get_input_embeddings(self) -> Any:
        """Return something to embed tokens with, for a model that does so outside its decoder."""
        return lambda ids: self._hidden_states


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
        layers_return_tuples: the decoder expects its layers' states as the first of a tuple.
        streaming: how weights that stay in their files are computed with; None when the weights
            are in memory as they compute.
        on_pass: called when the engine begins to run layers over a corpus.
    """

    causal_lm: PreTrainedModel
    decoder: nn.Module
    layers_path: str
    final_norm: nn.Module
    n_layers: int
    hidden_size: int
    layers_return_tuples: bool = False
    streaming: Streaming | None = None
    on_pass: list[Callable[[], None]] = field(default_factory=list, compare=False)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        found = self.causal_lm.get_submodule(self.layers_path)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        if self.streaming is not None:
            return self.streaming.device
        return next(self.causal_lm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        if self.streaming is not None:
            return self.streaming.dtype
        return next(self.layers.parameters()).dtype

    @cached_property
    def can_share_prefix(self) -> bool:
        """Whether keys and values are all that later tokens see of earlier ones."""
        kinds = {type(layer) for layer in DynamicCache(config=self.causal_lm.config).layers}
        return not self.causal_lm._is_stateful and kinds <= {
            DynamicLayer,
            DynamicSlidingWindowLayer,
        }

    @contextlib.contextmanager
    def loaded(self, first: int, stop: int | None = None) -> Iterator[None]:
        """Have the weights of layers `first` to `stop` - 1 in memory for a while.

        A streamed model reads them from its files; any other has them already.
        """
        if self.streaming is None:
            yield
            return
        with materialized(self.layers[first:stop], self.streaming):
            yield

    @contextlib.contextmanager
    def loaded_head(self) -> Iterator[None]:
        """Have the weights that make logits in memory for a while."""
        head = self.causal_lm.get_output_embeddings()
        if self.streaming is None or head is None:
            yield
            return
        with materialized([head], self.streaming):
            yield

    @contextlib.contextmanager
    def runnable(self) -> Iterator[None]:
        """Let the whole model run by itself for a while, as `generate` does with it."""
        if self.streaming is None:
            yield
            return
        head = self.causal_lm.get_output_embeddings()
        embedding = self.causal_lm.get_input_embeddings()
        with loading_itself(self.layers, embedding, head, self.streaming):
            yield

    def read_ahead(self, layer: int) -> None:
        """Begin to read a layer that is needed soon from its file."""
        if self.streaming is not None and layer < self.n_layers:
            read_ahead(self.layers[layer])

    def parameter_name(self, layer: int, name: str) -> str:
        """Name within `causal_lm` of parameter `name` of decoder layer `layer`."""
        return f"{self.layers_path}.{layer}.{name}"

    def layer_inputs(self, input_ids: Tensor, cache: Any = None) -> LayerInputs:
        """Run everything before the decoder layers.

        No attention mask is passed: with right padding and causal attention, pads never reach real
        tokens.

        Args:
            input_ids: (batch, seq_len) int64, padded on the right with any valid id.
            cache: keys and values of tokens before these; see `SharedPrefix`.
        """
        skeleton = _shallow_copy(self.decoder)
        input_ids = input_ids.to(self.device)
        if self.streaming is not None:
            embedding = self.causal_lm.get_input_embeddings()
            rows, input_ids = used_rows(embedding, input_ids, self.streaming)
            skeleton = _replaced(skeleton, embedding, with_rows(embedding, rows))
        attribute = self.layers_path.rpartition(".")[2]
        return _enter(skeleton, attribute, input_ids, self.layers_return_tuples, cache)

    def run_at(
        self, layer: int, call: LayerCall, hidden_states: Tensor, positions: Tensor
    ) -> Tensor:
        """Run a layer where only some tokens' outputs of each row are wanted.

        Attention reads all tokens, but all that follows it (most of a layer's weights) works token
        by token, and so runs on the wanted ones alone.

        Args:
            layer: index of the layer, whose weights must be loaded.
            call: what it receives beside the states.
            hidden_states: (batch, seq_len, hidden_size), its input.
            positions: (batch, n_wanted) int64, the wanted tokens of each row.

        Returns:
            (batch, n_wanted, hidden_size).
        """
        return run_layer_at(self.layers[layer], self.attention_name, call, hidden_states, positions)

    @cached_property
    def attention_name(self) -> str | None:
        """Name of the layers' child through which tokens see one another, where it was found."""
        with self.loaded(self.n_layers - 1):
            return find_attention(self)

    def logits(self, normed: Tensor) -> Tensor:
        """Apply the model's own head, with whatever scaling or soft capping it does.

        Args:
            normed: (batch, seq_len, hidden_size), states after the final norm.

        Returns:
            (batch, seq_len, vocab_size).
        """
        with self.loaded_head():
            return self._logits(normed)

    def _logits(self, normed: Tensor) -> Tensor:
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
    device = next(model.parameters()).device
    in_tuples = _expects_tuples(decoder, attribute, device)
    return DecoderStructure(
        causal_lm=model,
        decoder=decoder,
        layers_path=layers_path,
        final_norm=_find_final_norm(decoder, attribute, device, in_tuples),
        n_layers=n_layers,
        hidden_size=int(config.hidden_size),
        layers_return_tuples=in_tuples,
    )


def stream(structure: DecoderStructure, streaming: Streaming) -> DecoderStructure:
    """Return a structure whose large parts stay where they are until they are needed.

    Args:
        structure: of a model whose weights are mapped from their files.
        streaming: where to compute, and in which dtype; what is small is moved there now.
    """
    model = structure.causal_lm
    head = model.get_output_embeddings()
    large = [structure.layers, model.get_input_embeddings(), *([head] if head is not None else [])]
    place_small_parts(structure.decoder, large, streaming)
    return dataclasses.replace(structure, streaming=streaming)


def _owner(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _shallow_copy(module: Any) -> Any:
    """Copy a module without its parameters; its children can be swapped, the original stays."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def _replaced(decoder: Any, old: nn.Module, new: nn.Module) -> Any:
    """Return a shallow copy of a decoder in which one module, at any depth, is another."""
    copied = _shallow_copy(decoder)
    for name, child in decoder._modules.items():
        if child is old:
            copied._modules[name] = new
        elif child is not None and any(module is old for module in child.modules()):
            copied._modules[name] = _replaced(child, old, new)
    return copied


def _enter(
    decoder: nn.Module, attribute: str, input_ids: Tensor, in_tuples: bool, cache: Any = None
) -> LayerInputs:
    """Run `decoder`'s own forward with recorders in the place of its layers."""
    skeleton = _shallow_copy(decoder)
    calls: list[tuple[Tensor, LayerCall]] = []
    layers: Sequence[nn.Module] = decoder._modules[attribute]  # type: ignore[assignment]
    skeleton._modules[attribute] = nn.ModuleList(
        _Recorder(layer, calls, in_tuples) for layer in layers
    )
    given = {} if cache is None else {"past_key_values": cache}
    skeleton(input_ids=input_ids, use_cache=False, **given)
    if len(calls) != len(layers):
        raise ModelError(
            f"the model must run each of its {len(layers)} decoder layers once, but ran "
            f"{len(calls)}; PolyLens does not support this architecture"
        )
    return LayerInputs(calls[0][0], tuple(call for _, call in calls))


class _Reached(Exception):
    """Carries what attention was called with out of a layer that is cut short there."""

    def __init__(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.call = (args, keywords)


class _Stop(nn.Module):
    """Stands in for attention: ends the layer's forward, telling what it was called with."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        raise _Reached(args, keywords)


class _Answer(nn.Module):
    """Stands in for attention: returns what is known already."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *args: Any, **keywords: Any) -> Any:
        return self._output


def run_layer_at(
    layer: nn.Module,
    attention_name: str | None,
    call: LayerCall,
    hidden_states: Tensor,
    positions: Tensor,
) -> Tensor:
    """Run a decoder layer for some tokens of each row; see `DecoderStructure.run_at`.

    A layer with hooks is run whole, as they expect it: steering puts back what it took from each
    token.

    Args:
        layer: the layer, or a trainable copy of it.
        attention_name: the child through which tokens see one another; None runs all of the layer.
        call: what it receives beside the states.
        hidden_states: (batch, seq_len, hidden_size).
        positions: (batch, n_wanted) int64.

    Returns:
        (batch, n_wanted, hidden_size).
    """
    rows = torch.arange(len(positions), device=hidden_states.device)[:, None]
    if attention_name is None or layer._forward_hooks:
        return call(layer, hidden_states)[rows, positions]
    cut = _shallow_copy(layer)
    cut._modules[attention_name] = _Stop()
    try:
        call(cut, hidden_states)
    except _Reached as reached:
        args, keywords = reached.call
    attention = layer._modules[attention_name]
    assert attention is not None
    output = attention(*args, **keywords)
    mixed = output[0] if isinstance(output, tuple) else output  # (batch, seq_len, hidden_size)
    mixed = mixed[rows, positions]
    cut._modules[attention_name] = _Answer(
        (mixed, *output[1:]) if isinstance(output, tuple) else mixed
    )
    return call(cut, hidden_states[rows, positions])


@torch.no_grad()
def find_attention(structure: DecoderStructure) -> str | None:
    """Find the child of the last layer through which tokens see one another.

    It is the first child whose output at the last token changes with the first token; what comes
    before and after it works token by token. The find is tried out: where leaving the other
    tokens out changes a result, there is no such child (None), and layers run whole.
    """
    layer = _shallow_copy(structure.layers[-1])
    layer._forward_hooks = {}  # a trial is no pass: those who hooked the layer must not see it
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 4, structure.hidden_size, generator=generator)
    states[1, 1:] = states[0, 1:]  # the rows differ in their first token
    states = states.to(structure.device, structure.dtype)
    call = Calls(structure).of_batch(2, 4)[-1]
    mixing: list[str] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            if isinstance(found, Tensor) and not torch.equal(found[0, -1], found[1, -1]):
                mixing.append(name)

        return hook

    hooks = [child.register_forward_hook(note(name)) for name, child in layer.named_children()]
    try:
        whole = call(layer, states)[:, 1:]
    finally:
        for hook in hooks:
            hook.remove()
    if not mixing:
        return None
    wanted = torch.arange(1, 4, device=states.device).expand(2, 3)
    try:
        alone = run_layer_at(layer, mixing[0], call, states, wanted)
    except (RuntimeError, TypeError, IndexError, AttributeError, UnboundLocalError):
        return None
    tolerance = 1e-4 if structure.dtype == torch.float32 else 2e-2
    same = (alone - whole).float().norm() <= tolerance * whole.float().norm()
    return mixing[0] if same else None


@torch.no_grad()
def _expects_tuples(decoder: nn.Module, attribute: str, device: torch.device) -> bool:
    """Learn how the decoder takes its layers' states, and that we can run the layers one by one.

    Raises:
        ModelError: the layers receive more than states, positions and masks.
    """
    failures = []
    for in_tuples in (False, True):
        try:
            first, second = (
                _enter(decoder, attribute, torch.full((1, 2), token, device=device), in_tuples)
                for token in (0, 1)
            )
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
            failures.append(str(error).strip().partition("\n")[0])
            continue
        for one, other in zip(first.calls, second.calls, strict=True):
            if not _same(_leaves(one), _leaves(other)):
                raise ModelError(
                    "decoder layers must receive hidden states, positions and masks alone, but "
                    f"those of {type(decoder).__name__} receive something else of the tokens too; "
                    "PolyLens does not support this architecture"
                )
        return in_tuples
    raise ModelError(
        f"the model must run its decoder layers one after the other, but {type(decoder).__name__} "
        f"does not ({failures[0][:160]}); PolyLens does not support this architecture"
    )


def _leaves(call: LayerCall) -> list[Any]:
    """What a layer is called with, one by one; a mapping among the values stays whole."""

    def flat(value: Any) -> list[Any]:
        return (
            [leaf for one in value for leaf in flat(one)] if isinstance(value, tuple) else [value]
        )

    return flat((*call.args, *call.keywords.values()))


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether layers receive the same for other tokens, and nothing that they could fill."""
    return len(one) == len(other) and all(
        not isinstance(a, (dict, list)) and (not isinstance(a, Tensor) or torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def _find_final_norm(
    decoder: nn.Module, attribute: str, device: torch.device, in_tuples: bool
) -> nn.Module:
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
        def forward(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
            order.clear()  # keep only what runs after the last layer
            return super().forward(hidden_states, *args, **keywords)

    skeleton._modules[attribute] = nn.ModuleList(_Mark(layer, calls, in_tuples) for layer in layers)
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
