"""Two-dimensional pictures of hidden states: coordinates that a reader can look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polylens.subspaces import Subspaces


@dataclass(frozen=True)
class Plane:
    """Two axes, fitted once, so that before and after are drawn in one frame.

    Attributes:
        origin: (hidden_size,).
        axes: (2, hidden_size).
    """

    origin: Tensor
    axes: Tensor

    def coordinates(self, states: Tensor) -> Tensor:
        """Coordinates of states (n, hidden_size) on the two axes, (n, 2)."""
        return (states.double() - self.origin) @ self.axes.T


def specific_plane(states: Mapping[str, Tensor], subspaces: Subspaces, layer: int) -> Plane:
    """First two principal axes of the states within the language-specific subspace.

    Where that subspace has one dimension, the second axis is the strongest one outside it.

    Args:
        states: language → (n, hidden_size).
        subspaces: of the model.
        layer: whose states these are.
    """
    everything = torch.cat(list(states.values())).double()
    inside = subspaces.project_specific(everything, layer)
    axes = _principal(inside, 2)
    if subspaces.rank == 1:
        outside = _principal(everything - inside, 1)
        axes = torch.cat([axes[:1], outside])
    return Plane(everything.mean(0), axes)


def agnostic_plane(states: Mapping[str, Tensor], subspaces: Subspaces, layer: int) -> Plane:
    """The language-agnostic axis mu_a, and the strongest axis outside both subspaces.

    Arguments as in `specific_plane`.
    """
    everything = torch.cat(list(states.values())).double()
    vector = subspaces.agnostic_vector[subspaces.position(layer)]
    first = (vector / vector.norm())[None]
    rest = everything - subspaces.project_specific(everything, layer)
    rest = rest - rest @ first.T @ first
    return Plane(everything.mean(0), torch.cat([first, _principal(rest, 1)]))


def _principal(states: Tensor, n_axes: int) -> Tensor:
    """Principal axes (n_axes, hidden_size); the entry of largest magnitude in each is positive."""
    axes: Tensor = torch.linalg.svd(states - states.mean(0), full_matrices=False).Vh[:n_axes]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return axes * largest.sign()
