"""Low-rank updates of a crown (LoRA, Hu et al. 2021, arXiv 2106.09685), through peft.

A weight of shape (out, in) becomes W + alpha/rank · B·A with B (out, rank) and A (rank, in), of
which B and A alone train. Afterwards the products are the change, like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polylens.crown import Crown
from polylens.errors import MissingExtraError, ModelError
from polylens.models.structure import DecoderStructure


class LowRankCrown(Crown):
    """A crown whose linear maps train by low-rank updates; everything else in it is frozen.

    Args:
        structure: the untouched model; it is not changed.
        trainable: layers whose linear maps are updated.
        rank: of the update of each.
        alpha: the update is scaled by alpha / rank.
        seed: of A's first values; B starts at 0.

    Raises:
        MissingExtraError: peft is not installed.
        ModelError: the layers have no linear maps.
    """

    def __init__(
        self,
        structure: DecoderStructure,
        trainable: Sequence[int],
        *,
        rank: int,
        alpha: float,
        seed: int,
    ) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise MissingExtraError("peft", "lora", "training by low-rank updates") from error
        super().__init__(structure, trainable)
        places = [index - self.boundary_layer for index in self.trainable]
        linear = [
            f"{place}.{name}"
            for place in places
            for name, module in self.layers[place].named_modules()
            if isinstance(module, nn.Linear)
        ]
        if not linear:
            raise ModelError(
                f"low-rank updates need layers with linear maps, but those of "
                f"{type(structure.causal_lm).__name__} have none; use polylens baseline sft"
            )
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type] # any number does
            target_modules="|".join(map(re.escape, linear)),
        )
        with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator
            torch.manual_seed(seed)
            inject_adapter_in_model(config, self.layers)
        self._updated = linear
        self.eval()

    def named_trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every A and B, under their names within the crown's layers."""
        for name, parameter in self.layers.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    @torch.no_grad()
    def into_changes(self) -> dict[str, Tensor]:
        """Return the change of each updated weight, float32, on the CPU."""
        changes = {}
        for path in self._updated:
            place, _, name = path.partition(".")
            index = self.boundary_layer + int(place)
            linear: Any = self.layers.get_submodule(path)  # peft's layer around the map
            update = linear.get_delta_weight("default")
            full_name = self.structure_[0].parameter_name(index, f"{name}.weight")
            changes[full_name] = update.float().cpu().contiguous()
        return changes
