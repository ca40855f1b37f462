"""Weights whose change has a low rank: `W + up · down`, with W frozen (LoRA).

The change is a parametrisation of torch's, so that a layer computes with its changed weights
whatever its own code does with them; experts that are joined in one weight get factors each.

Source: Hu et al. 2021, LoRA (arXiv 2106.09685), without its scale: that is the learning rate's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRankChange(nn.Module):
    """Adds `up · down` to a weight; nothing at first, since `up` begins at zero.

    Attributes:
        up: (…, n_out, rank).
        down: (…, rank, n_in).
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *batch, n_out, n_in = weight.shape
        rank = min(rank, n_out, n_in)
        self.up = nn.Parameter(torch.zeros(*batch, n_out, rank, device=weight.device))
        drawn = torch.randn(*batch, rank, n_in, generator=generator) / n_in**0.5
        self.down = nn.Parameter(drawn.to(weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight, shape of `weight`."""
        return weight + self.change()

    def change(self) -> Tensor:
        """Return what is added, shape of the weight."""
        return self.up @ self.down


def add_low_rank_changes(layer: nn.Module, rank: int, generator: torch.Generator) -> None:
    """Give every matrix of a layer, whose weights are frozen, a change that trains.

    Args:
        layer: of float32 weights; its norms and biases stay as they are.
        rank: of each change; a smaller matrix's is its own.
        generator: of the factors.
    """
    matrices = [
        (module, name)
        for module in list(layer.modules())
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim >= 2
    ]
    for module, name in matrices:
        change = LowRankChange(getattr(module, name), rank, generator)
        parametrize.register_parametrization(module, name, change)


def low_rank_changes(layer: nn.Module) -> Iterator[tuple[str, LowRankChange]]:
    """Yield each change under the name of its weight within the layer."""
    for path, module in layer.named_modules():
        if isinstance(module, LowRankChange):
            # "self_attn.q_proj.parametrizations.weight.0"
            owner, _, rest = path.partition("parametrizations.")
            yield f"{owner}{rest.rpartition('.')[0]}", module
