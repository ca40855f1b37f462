"""What a training on tokens costs, counted from its plan rather than timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polylens.config import CrownSettings
from polylens.crown import Crown
from polylens.hidden_states import HiddenStates
from polylens.models.structure import DecoderStructure


@dataclass(frozen=True)
class Cost:
    """What a training takes, whatever the machine.

    Attributes:
        tokens: seen over all epochs, prompts included.
        scored_tokens: of these, predicted.
        operations: floating-point operations; see `count_operations`.
        trained_parameters: numbers that the optimizer changes.
    """

    tokens: int
    scored_tokens: int
    operations: int
    trained_parameters: int


def count_operations(
    crown: Crown, states: HiddenStates, n_scored: Sequence[int], settings: CrownSettings
) -> int:
    """Count the floating-point operations of all products with weights, the trunk pass included.

    A product of a token with a matrix of P weights takes 2·P operations, the gradient of what it
    reads 2·P more, and that of the weights, where they train, another 2·P. With T the tokens that
    an epoch runs (the prefix that all rows share once a step) and S those that are predicted:

        trunk   2·P·(tokens kept)                       once
        crown   (2 + 2)·P·T, and 2·P·T where it trains  each epoch
        head    (2 + 2)·P·S                             each epoch

    In the last layer, what follows attention runs on S tokens instead of T. Matrices of a low-rank
    update count as weights in training, those that they are added to as frozen.

    Note:
        Left out are attention's products of states with states, padding, norms and the optimizer:
        a few hundredths at these lengths. Of a mixture of experts all weights count, though few
        run.

    Args:
        crown: ready to be trained.
        states: of the trunk pass.
        n_scored: predicted tokens of each row.
        settings: of the training.
    """
    structure = crown.structure_[0]
    kept = states.offsets[-1]
    steps = math.ceil(len(n_scored) / settings.batch_size)
    own = kept - states.prefix_length
    run, scored = own + states.prefix_length * steps, sum(n_scored)
    trunk = sum(_matrices(structure, layer) for layer in range(crown.boundary_layer))
    head = structure.causal_lm.get_output_embeddings()
    epoch = 4 * scored * (head.weight.numel() if head is not None else 0)
    for index, layer in enumerate(crown.layers, start=crown.boundary_layer):
        is_last = index == structure.n_layers - 1 and structure.attention_name is not None
        for name, weight in layer.named_parameters():
            if weight.ndim > 1:
                after = is_last and name.split(".")[0] != structure.attention_name
                per_weight = 6 if weight.requires_grad else 4
                epoch += per_weight * weight.numel() * (scored if after else run)
    return 2 * trunk * kept + settings.epochs * epoch


def _matrices(structure: DecoderStructure, layer: int) -> int:
    return sum(weight.numel() for weight in structure.layers[layer].parameters() if weight.ndim > 1)
