"""Steering without training: language components of the residual stream, added or taken away.

A `Steering` acts on the outputs of decoder layers with vectors of `Subspaces`: `Towards` adds a
language's direction, `Removal` takes the language-specific part away and, if wanted, puts it back
further up. `Steering.applied` makes a model another one for a while, as `CrownDelta.applied` does,
so a steering is a candidate wherever a delta is.

Every token is steered, those of the prompt and those of the answer alike; so it makes no difference
whether a token is run with its prompt or alone, from the keys and values of those before it.

What acts is the sum of all actions. Where it is nothing, nothing is registered, and the model
computes what it does without, bit for bit.

Sources: Zhao et al. 2024, Lens (arXiv 2410.04407), for the directions; Zhao et al. 2025 (arXiv
    2505.15257) for removal in middle layers, which they find to help reasoning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polylens.errors import LanguageError, SubspaceError, UsageError
from polylens.models.structure import DecoderStructure
from polylens.subspaces import Subspaces

Reference = Literal["mean", "origin"]

# Upper layers are those from the first at which languages lie at least so far apart as this share
# of the farthest. SmolLM2-135M: 19 to 28 of 30; tried on a few prompts, a push there brought
# answers in the language, and one of the same length in layers 10 to 19 broke them.
_FAR_RATIO = 2 / 3

# Layers tell languages apart when they do so nearly as well as the best layer does.
_SEPARABLE_RATIO = 0.95


@dataclass(frozen=True)
class Towards:
    """Push states along a language's direction: h + strength / n · omega_l at each of n layers.

    The strength is divided among the layers, since what one adds stays in the residual stream: so
    it means the same for one layer and for ten.

    Attributes:
        language: one that was probed, other than the central one, from which directions begin.
        strength: 1 is as far, over all layers together, as the language's mean is from the central
            one's in the specific subspace. Negative pushes away.
        layers: whose outputs are pushed, each along its own direction; None takes `upper_layers`.
    """

    language: str
    strength: float = 1.0
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Removal:
    """Take the language-specific part away: h - strength · P_s (h - reference) at each layer.

    What the layers take from a token can be carried past those above, and put back: `reinsert`
    times the sum of it is added to the output of layer `reinsert_at`, within the same forward.

    Attributes:
        strength: share of the part that each layer takes; negative adds to it instead.
        layers: that take it; None takes `middle_layers`.
        reinsert: share of what was taken that is put back.
        reinsert_at: not below `layers`; None takes the first of `upper_layers`.
        reference: the state of which nothing is taken. "mean": the mean of the language means, so
            that what goes is what sets a state apart from it. "origin": as published, where what
            all languages have in common within the subspace goes too.
    """

    strength: float = 1.0
    layers: tuple[int, ...] | None = None
    reinsert: float = 0.0
    reinsert_at: int | None = None
    reference: Reference = "mean"


Action = Towards | Removal


@dataclass(frozen=True)
class Steering:
    """Actions on the residual stream of one model.

    Attributes:
        subspaces: of the model.
        actions: what is done, all at once; at least one.

    Raises:
        LanguageError: an action names a language that was not probed, or the central one.
        SubspaceError: a layer does not exist or was not probed, or none can be chosen.
        UsageError: there is no action, a number is not finite, or a part would be put back below
            where it is taken.
    """

    subspaces: Subspaces
    actions: Sequence[Action]

    def __post_init__(self) -> None:
        if not self.actions:
            raise UsageError("a steering must have at least one action, got none; add one")
        assert self.resolved

    @cached_property
    def resolved(self) -> tuple[Action, ...]:
        """The actions with their layers, whether given or chosen."""
        return tuple(_resolve(action, self.subspaces) for action in self.actions)

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers whose outputs it may change, ascending."""
        found: set[int] = set()
        for action in self.resolved:
            assert action.layers is not None
            found.update(action.layers)
            if isinstance(action, Removal) and action.reinsert:
                assert action.reinsert_at is not None
                found.add(action.reinsert_at)
        return tuple(sorted(found))

    @contextlib.contextmanager
    def applied(
        self, structure: DecoderStructure, strength: float = 1.0, dtype: torch.dtype | None = None
    ) -> Iterator[None]:
        """Steer a model for a while; afterwards it is bit for bit what it was.

        Args:
            structure: the model.
            strength: multiplies what every action pushes or takes: 0 is the untouched model.
            dtype: of weights, which steering does not change; taken as `CrownDelta.applied` does.

        Raises:
            SubspaceError: the subspaces are of a model of another shape.

        Note:
            What is put back has to be taken in the same pass. A pass that begins between the two
            layers is refused; one that stops there (boundary states for a crown) is of no use.
        """
        n_layers, hidden_size = n_layers_of(self.subspaces), self.subspaces.language_means.shape[-1]
        if (structure.n_layers, structure.hidden_size) != (n_layers, hidden_size):
            raise SubspaceError(
                f"subspaces must be those of the model in use, but they are of {n_layers} layers "
                f"of size {hidden_size} and it has {structure.n_layers} of size "
                f"{structure.hidden_size}; probe this model"
            )
        edits = _edits(self.subspaces, self.resolved, strength, structure.device)
        steered = [(structure.layers[layer], edit) for layer, edit in edits.items()]
        taken = [queue for edit in edits.values() for queue, _ in edit.taken]

        def forget() -> None:
            for queue in taken:  # left over where a pass failed half-way, or stopped
                queue.clear()

        def forget_before(module: nn.Module, args: Any) -> None:
            if module is structure.decoder:  # the engine runs copies, layer by layer
                forget()

        hooks = []
        try:
            for layer, edit in steered:
                hooks.append(layer.register_forward_hook(edit))
            if taken:
                hooks.append(structure.decoder.register_forward_pre_hook(forget_before))
            structure.on_pass.append(forget)
            yield
        finally:
            structure.on_pass.remove(forget)
            for hook in hooks:
                hook.remove()


def upper_layers(subspaces: Subspaces) -> tuple[int, ...]:
    """Return the layers where languages lie far apart: a push there is a push in language.

    They begin at the first layer at which ‖omega_l‖ / ‖m_c‖, averaged over languages, is at least
    two thirds of the largest, and end with the last layer but one: the last one's output goes to
    the head, and its language-specific subspace is rather that of the first word of an answer.

    Raises:
        SubspaceError: no layer below the last was probed.
    """
    last = n_layers_of(subspaces) - 1
    layers = [layer for layer in subspaces.layers if layer < last]
    others = [k for k in subspaces.languages if k != subspaces.central]
    apart = [sum(subspaces.distances(k, layer)[1] for k in others) for layer in layers]
    if not layers:
        raise SubspaceError(
            f"steering must be given its layers where none below layer {last} was probed; name "
            "them, or probe all layers"
        )
    first = next(i for i, far in enumerate(apart) if far >= _FAR_RATIO * max(apart))
    return tuple(layers[first:])


def middle_layers(subspaces: Subspaces) -> tuple[int, ...]:
    """Return the layers that know the language, below those where languages lie far apart.

    They begin at the first layer that separates languages nearly as well (95 %) as the best does,
    and end below `upper_layers`.

    Raises:
        SubspaceError: there are none.
    """
    upper = upper_layers(subspaces)
    separability = subspaces.separability.tolist()
    least = _SEPARABLE_RATIO * max(separability)
    pairs = list(zip(subspaces.layers, separability, strict=True))
    first = next(layer for layer, separable in pairs if separable >= least)
    found = tuple(layer for layer, _ in pairs if first <= layer < upper[0])
    if not found:
        raise SubspaceError(
            "a removal must be given its layers where none separates languages below the upper "
            f"layers, which begin at {upper[0]} here; name them"
        )
    return found


def n_layers_of(subspaces: Subspaces) -> int:
    """Return the number of decoder layers of the model that was probed.

    Raises:
        SubspaceError: the subspaces do not tell.
    """
    if "n_layers" not in subspaces.metadata:
        raise SubspaceError(
            "subspaces must tell n_layers of their model in their metadata to steer with; probe "
            "with `polylens probe` or polylens.probe"
        )
    return int(subspaces.metadata["n_layers"])


def _resolve(action: Action, subspaces: Subspaces) -> Action:
    """Check an action, and fill in its layers."""
    if isinstance(action, Towards):
        _check_numbers(strength=action.strength)
        others = [k for k in subspaces.languages if k != subspaces.central]
        if action.language not in others:
            raise LanguageError(
                f"steering must go towards one of the probed languages ({', '.join(others)}), got "
                f"{action.language!r}; "
                + (
                    "to go towards the central one, push away from another by a negative strength"
                    if action.language == subspaces.central
                    else "probe with it or choose another"
                )
            )
        layers = upper_layers(subspaces) if action.layers is None else action.layers
        return dataclasses.replace(action, layers=_check_layers(layers, subspaces))
    _check_numbers(strength=action.strength, reinsert=action.reinsert)
    layers = middle_layers(subspaces) if action.layers is None else action.layers
    layers = _check_layers(layers, subspaces)
    reinsert_at = action.reinsert_at
    if action.reinsert:
        if reinsert_at is None:
            reinsert_at = upper_layers(subspaces)[0]
        _check_layers([reinsert_at], subspaces)
        if reinsert_at < layers[-1]:
            raise UsageError(
                "what is removed must be put back at the layer that takes it or above, but layer "
                f"{layers[-1]} takes and {reinsert_at} puts back; choose a higher layer to "
                "reinsert at"
            )
    return dataclasses.replace(action, layers=layers, reinsert_at=reinsert_at)


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise UsageError(f"{name} must be a finite number, got {number}")


def _check_layers(layers: Sequence[int], subspaces: Subspaces) -> tuple[int, ...]:
    """Return layers ascending, each once; each must have an output to change and directions."""
    n_layers = n_layers_of(subspaces)
    if not layers:
        raise SubspaceError("steering must have at least one layer to act at, got none; name some")
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise SubspaceError(
                f"steering must act at decoder layers, 0 to {n_layers - 1}, got {layer}; choose "
                "one of those"
            )
        subspaces.position(layer)
    return tuple(sorted(set(layers)))


class _Edit:
    """What is done to the output of one layer; a forward hook.

    Attributes:
        offset: (hidden_size,) float32, added to every token.
        basis: (rank, hidden_size) float32, of the layer's specific subspace.
        removed: shares and reference coordinates, (rank,) each, of parts that are taken.
        taken: queues and reference coordinates of parts that are carried further up.
        put_back: queues, bases of the layers that fill them, and shares.
    """

    def __init__(self, basis: Tensor) -> None:
        self.offset = torch.zeros(basis.shape[1], device=basis.device)
        self.basis = basis
        self.removed: list[tuple[float, Tensor]] = []
        self.taken: list[tuple[deque[Tensor], Tensor]] = []
        self.put_back: list[tuple[deque[Tensor], Tensor, float]] = []

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        states: Tensor = output[0] if isinstance(output, tuple) else output
        exact = states.float()
        change = self.offset
        if self.removed or self.taken:
            coordinates = exact @ self.basis.T  # (batch, seq_len, rank)
            for share, centre in self.removed:
                change = change - share * ((coordinates - centre) @ self.basis)
            # A queue, since the engine runs all batches through a layer before the next layer: they
            # come in one order at both. Coordinates, since they are few.
            for queue, centre in self.taken:
                queue.append(coordinates - centre)
        for queue, basis, share in self.put_back:
            change = change + share * (_next(queue, states) @ basis)
        steered = (exact + change).to(states.dtype)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered


def _next(queue: deque[Tensor], states: Tensor) -> Tensor:
    if queue and queue[0].shape[:-1] == states.shape[:-1]:
        return queue.popleft()
    raise UsageError(
        "what is put back must have been taken from the same tokens in the same pass, but was not; "
        "run the whole model, or begin the pass at the layers that take it"
    )


def _edits(
    subspaces: Subspaces, actions: Sequence[Action], strength: float, device: torch.device
) -> dict[int, _Edit]:
    """Work out what all actions come to at each layer; what cancels out is left out."""
    pushed: defaultdict[tuple[int, str], float] = defaultdict(float)
    removed: defaultdict[tuple[int, Reference], float] = defaultdict(float)
    carried: defaultdict[tuple[int, Reference, int], float] = defaultdict(float)
    for action in actions:
        assert action.layers is not None
        for layer in action.layers:
            if isinstance(action, Towards):
                share = strength * action.strength / len(action.layers)
                pushed[layer, action.language] += share
                continue
            share = strength * action.strength
            removed[layer, action.reference] += share
            if not action.reinsert:
                continue
            assert action.reinsert_at is not None
            if action.reinsert_at == layer:  # taken and put back in one place
                removed[layer, action.reference] -= share * action.reinsert
            else:
                carried[layer, action.reference, action.reinsert_at] += share * action.reinsert

    edits: dict[int, _Edit] = {}

    def at(layer: int) -> _Edit:
        if layer not in edits:
            basis = subspaces.specific_basis[subspaces.position(layer)]
            edits[layer] = _Edit(basis.to(device, torch.float32))
        return edits[layer]

    def centre(layer: int, reference: Reference) -> Tensor:
        position = subspaces.position(layer)
        mean = subspaces.language_means[position].mean(0)
        coordinates = subspaces.specific_basis[position] @ mean
        if reference == "origin":
            coordinates = torch.zeros_like(coordinates)
        return coordinates.to(device, torch.float32)

    for (layer, language), share in pushed.items():
        if share:
            vector = share * subspaces.direction(language, layer)
            at(layer).offset += vector.to(device, torch.float32)
    for (layer, reference), share in removed.items():
        if share:
            at(layer).removed.append((share, centre(layer, reference)))
    for (layer, reference, top), share in carried.items():
        if share:
            queue: deque[Tensor] = deque()
            at(layer).taken.append((queue, centre(layer, reference)))
            at(top).put_back.append((queue, at(layer).basis, share))
    return edits
