"""The crown: the decoder layers from the boundary up, run from the states that enter them.

`run_crown` runs the model's own top layers (with whatever weights they hold now); `Crown` is a
trainable copy of them with float32 master weights. `CrownDelta` is what training leaves: the change
of each weight, with a strength dial. `Change` is what a delta and a steering have in common.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polylens.artefacts import load_tensors, save_tensors
from polylens.errors import CorruptFileError, ModelError, UsageError
from polylens.hidden_states import HiddenStates, gather, token_batches
from polylens.models.structure import Calls, DecoderStructure, run_layer_at
from polylens.token_budget import best_token_budget

# What a batch in training costs beside its padded tokens, in tokens: one more gradient of every
# weight is made and added up. On two cores and a crown of 94 million weights, an epoch took 69 s
# with 0 here, 25 s with 64, 21 s with 200.
_TRAINING_BATCH_COST = 256


class Crown(nn.Module):
    """A trainable float32 copy of decoder layers `boundary_layer` and up.

    The update of a step is far below the spacing of bfloat16 numbers, so the weights in training
    are float32 whatever the model's dtype; where the model computes in bfloat16, autocast does too.
    Not in float16, whose smallest numbers are larger than most gradients here.

    Args:
        structure: the model; its weights are copied.
        trainable: layers whose weights train; the others, and the final norm, are frozen.

    Attributes:
        boundary_layer: the first layer of the crown.
        trainable: as given.
    """

    def __init__(self, structure: DecoderStructure, trainable: Sequence[int]) -> None:
        super().__init__()
        self.structure_ = [structure]  # in a list: the whole model must not become our child
        self.boundary_layer = min(trainable)
        self.trainable = tuple(trainable)
        own = structure.layers[self.boundary_layer :]
        where = structure.device
        self.layers = nn.ModuleList(copy.deepcopy(layer).to(where).float() for layer in own)
        self.final_norm = copy.deepcopy(structure.final_norm).float()
        self.requires_grad_(False)
        for index in trainable:
            self.layers[index - self.boundary_layer].requires_grad_(True)
        self.eval()  # no dropout: the reference states have none

    def forward(
        self,
        calls: Calls,
        boundary: Tensor,
        *,
        positions: Tensor | None = None,
        is_prefix: bool = False,
    ) -> Tensor:
        """Run the crown.

        Args:
            calls: what the layers receive beside the states.
            boundary: (batch, seq_len, hidden_size), states that enter `boundary_layer`, padded on
                the right.
            positions: (batch, n_wanted) int64; only these tokens' outputs of each row are wanted.
                None wants all.
            is_prefix: these are the states of the shared prefix; must be run first.

        Returns:
            The last layer's output before the final norm, float32: (batch, seq_len, hidden_size),
            or (batch, n_wanted, hidden_size) with `positions`.
        """
        structure = self.structure_[0]
        narrow = structure.dtype == torch.bfloat16
        with torch.autocast(boundary.device.type, torch.bfloat16, enabled=narrow):
            output = _run(
                structure,
                self.layers,
                self.boundary_layer,
                calls,
                boundary.float(),
                positions,
                is_prefix,
            )
        return output.float()

    def run_prefix(self, calls: Calls, states: HiddenStates) -> Tensor | None:
        """Run the tokens that all prompts begin with, once for the prompts that follow.

        Returns:
            (1, prefix_length, hidden_size), for `run_kept`; None where prompts share nothing.
        """
        if not states.prefix_length:
            return None
        boundary = states.boundary[self.boundary_layer][None, : states.prefix_length]
        return self(calls, boundary.to(calls.device), is_prefix=True)  # type: ignore[no-any-return]

    def run_kept(
        self,
        calls: Calls,
        states: HiddenStates,
        prompts: Sequence[int],
        *,
        prefix: Tensor | None,
        n_last: Sequence[int] | None,
        token_budget: int,
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Run some prompts from kept states, batch by batch; gradients flow.

        Args:
            calls: what the layers receive beside the states.
            states: with what enters `boundary_layer`.
            prompts: their indices within `states`.
            prefix: from `run_prefix`.
            n_last: by index, how many of a prompt's last tokens are wanted; None wants all.
            token_budget: padded tokens of a batch.

        Yields:
            As `run_crown`; float32.
        """

        def run(boundary: Tensor, positions: Tensor | None = None) -> Tensor:
            boundary = boundary.to(calls.device)
            return self(calls, boundary, positions=positions)  # type: ignore[no-any-return]

        lengths = [states.offsets[index + 1] - states.offsets[index] for index in prompts]
        batches = (
            [prompts[place] for place in batch]
            for batch in token_batches(lengths, token_budget, _TRAINING_BATCH_COST)
        )
        yield from _run_batches(run, states, self.boundary_layer, batches, prefix, n_last)

    @contextlib.contextmanager
    def noting(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Note the outputs of some layers below the last one, as they run; gradients flow.

        Yields:
            Layer → (batch, seq_len, hidden_size) float32, of the batch that ran last.
        """
        outputs: dict[int, Tensor] = {}

        def note(index: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                outputs[index] = states.float()

            return hook

        handles = [
            self.layers[index - self.boundary_layer].register_forward_hook(note(index))
            for index in layers
        ]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def named_trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights in training under their names within the whole model."""
        structure = self.structure_[0]
        for index in self.trainable:
            for name, parameter in self.layers[index - self.boundary_layer].named_parameters():
                yield structure.parameter_name(index, name), parameter

    @torch.no_grad()
    def into_changes(self) -> dict[str, Tensor]:
        """Turn every trained weight into its change against the model's own, float32, on the CPU.

        The crown is of no use afterwards: where memory is short, there is no room for both.
        """
        original = dict(self.structure_[0].causal_lm.named_parameters())
        return {
            name: parameter.detach().sub_(original[name].detach().to(parameter)).cpu()
            for name, parameter in self.named_trainable()
        }


@torch.no_grad()
def run_crown(
    structure: DecoderStructure,
    states: HiddenStates,
    *,
    token_budget: int | None = None,
    boundary_layer: int | None = None,
    n_last: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Run the model's own top layers on kept boundary states, batch by batch.

    Args:
        structure: the model; its layers are used as they are now, so a delta may be applied.
        states: with boundary states.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        boundary_layer: where to begin; None takes the lowest layer whose input was kept.
        n_last: how many of each prompt's last tokens are wanted, at least one; None wants all. Most
            of the last layer is run on these alone.

    Yields:
        Indices of the prompts; (batch, n_wanted, hidden_size) output of the last layer before the
        final norm for the wanted tokens, padded on the right; (batch,) numbers of them.
    """
    first = min(states.boundary) if boundary_layer is None else boundary_layer
    layers = structure.layers[first:]
    calls = Calls(structure, states.prefix_length)
    budget = token_budget or best_token_budget(structure, int(states.lengths.sum()))

    def run(boundary: Tensor, positions: Tensor | None = None, is_prefix: bool = False) -> Tensor:
        boundary = boundary.to(structure.device, structure.dtype)
        return _run(structure, layers, first, calls, boundary, positions, is_prefix)

    with structure.loaded(first):
        prefix = None
        if states.prefix_length:
            shared = states.boundary[first][None, : states.prefix_length]
            prefix = run(shared, is_prefix=True)
        own_lengths = (states.lengths - states.prefix_length).tolist()
        batches = token_batches(own_lengths, budget)
        yield from _run_batches(run, states, first, batches, prefix, n_last)


class _Run(Protocol):
    """Runs a batch of boundary states, at some positions or at all."""

    def __call__(self, boundary: Tensor, positions: Tensor | None = None) -> Tensor: ...


def _run_batches(
    run: _Run,
    states: HiddenStates,
    first: int,
    batches: Iterable[list[int]],
    prefix: Tensor | None,
    n_last: Sequence[int] | None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Run batches of prompts from the states that enter layer `first`; see `run_crown`."""
    for rows in batches:
        boundary, lengths = gather(states.boundary[first], states.offsets, rows)
        if n_last is None:
            yield rows, _after(prefix, run(boundary)), lengths + states.prefix_length
            continue
        wanted = torch.tensor([n_last[row] for row in rows])
        positions = _last_positions(lengths, wanted)
        if int((lengths - wanted).min()) >= 0:
            output = run(boundary, positions)
        else:  # some of the wanted tokens lie in the prefix
            positions = _last_positions(lengths + states.prefix_length, wanted)
            batch = torch.arange(len(rows))[:, None]
            output = _after(prefix, run(boundary))[batch, positions]
        yield rows, output, wanted


def _after(prefix: Tensor | None, output: Tensor) -> Tensor:
    """Put the prefix's states, (1, length, d), before those of each row."""
    if prefix is None:
        return output
    return torch.cat([prefix.expand(len(output), -1, -1), output], dim=1)


def _last_positions(lengths: Tensor, wanted: Tensor) -> Tensor:
    """Positions of the last tokens of each row, (batch, most wanted); any token pads a row."""
    first = (lengths - wanted).clamp(min=0)
    positions = first[:, None] + torch.arange(int(wanted.max()))
    return positions.minimum(lengths[:, None] - 1)


def _run(
    structure: DecoderStructure,
    layers: nn.ModuleList,
    first: int,
    calls: Calls,
    hidden_states: Tensor,
    positions: Tensor | None,
    is_prefix: bool,
) -> Tensor:
    known = calls.of_prefix() if is_prefix else calls.of_batch(*hidden_states.shape[:2])
    positions = None if positions is None else positions.to(hidden_states.device)
    for index, layer in enumerate(layers, start=first):
        if positions is not None and index == structure.n_layers - 1:
            name = structure.attention_name
            return run_layer_at(layer, name, known[index], hidden_states, positions)
        hidden_states = known[index](layer, hidden_states)
    if positions is not None:  # no layer at all
        rows = torch.arange(len(positions), device=hidden_states.device)[:, None]
        return hidden_states[rows, positions]
    return hidden_states


class Change(Protocol):
    """What makes a model another one for a while: a `CrownDelta`, or a `Steering`."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that it changes; below the lowest, states are those of the untouched."""

    def applied(
        self, structure: DecoderStructure, strength: float = 1.0, dtype: torch.dtype | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Change the model for a while; a strength of 0 changes nothing, to the bit."""


@dataclass(frozen=True)
class CrownDelta:
    """What training changed: `W + strength · change`, for every weight that trained.

    Attributes:
        changes: parameter name within the model → change, shape of the weight, float32.
        metadata: fingerprint and name of the model it belongs to, layers, languages, settings.
    """

    changes: Mapping[str, Tensor]
    metadata: Mapping[str, Any]

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that it changes."""
        return tuple(self.metadata["layers"])

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        save_tensors(Path(path), self.changes, {"kind": "polylens.delta", **self.metadata})

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None = None) -> CrownDelta:
        """Read what `save` wrote.

        Args:
            path: the file.
            fingerprint: of the model that the delta is for; None accepts any.

        Raises:
            UsageError: the file holds something else, or a delta of another model.
            CorruptFileError: the file is damaged.
        """
        tensors, metadata = load_tensors(Path(path))
        if metadata.pop("kind", None) != "polylens.delta":
            raise UsageError(
                f"{path} must hold a delta, but holds something else; give the delta.safetensors "
                "that `polylens train` or `polylens enhance` wrote"
            )
        if fingerprint is not None and metadata.get("fingerprint") != fingerprint:
            raise UsageError(
                f"a delta must be applied to the model it was trained on, but {path} belongs to "
                f"another one ({metadata.get('model', 'unknown')}); load that model"
            )
        layers = metadata.get("layers")
        if not isinstance(layers, list) or not all(isinstance(one, int) for one in layers):
            raise CorruptFileError(f"{path} must say which layers it changes; train again")
        return cls(tensors, metadata)

    def weights(
        self, structure: DecoderStructure, strength: float = 1.0, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return the changed weights, on the device of the model.

        Args:
            structure: the model.
            strength: the dial: 0 is the untouched model, 1 the trained one.
            dtype: of the result; None takes the model's own.

        Raises:
            ModelError: the model lacks one of the weights, or it has another shape.
        """
        original = dict(structure.causal_lm.named_parameters())
        changed: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            weight = original.get(name)
            if weight is None or weight.shape != change.shape:
                raise ModelError(
                    f"the model must have the weight {name} of shape {tuple(change.shape)} that "
                    "the delta changes, but has not; apply the delta to the model it was trained on"
                )
            where = structure.device
            exact = torch.add(weight.detach().to(where).float(), change.to(where), alpha=strength)
            changed[name] = exact.to(dtype or structure.dtype)
        return changed

    @contextlib.contextmanager
    def applied(
        self, structure: DecoderStructure, strength: float = 1.0, dtype: torch.dtype | None = None
    ) -> Iterator[None]:
        """Give the model the changed weights for a while; afterwards it is bit for bit what it was.

        Args:
            structure: the model.
            strength: the dial.
            dtype: round to this dtype first, as a model saved in it would be.
        """
        changed = self.weights(structure, strength, dtype)
        parameters = dict(structure.causal_lm.named_parameters())
        original = {name: parameters[name].data for name in changed}
        try:
            for name, weight in changed.items():
                parameters[name].data = weight.to(structure.dtype)
            yield
        finally:
            for name, weight in original.items():
                parameters[name].data = weight
