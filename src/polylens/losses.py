"""The losses of language subspace manipulation (LSM), one unit each.

Each returns one value a row; those of states are squared differences, averaged over hidden
dimensions: ‖difference‖² / hidden_size. The caller takes means over rows and sums over target
languages. Names follow the
paper's text: `AlignLoss` pulls a target language towards the central one in the agnostic subspace,
`SeparateLoss` pushes it along its own direction in the specific subspace, `RetainLoss` holds the
central language where it was. (The published code names the first two the other way round.)

Source: Zhao et al. 2024, Lens (arXiv 2410.04407), section 3.2, equations 1 to 4;
`RetainDistributionLoss` is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from polylens.subspaces import Subspaces


@dataclass(frozen=True)
class AlignLoss:
    """‖P_a h_l - P_a h_c‖² / d: the target meets the centre where languages agree.

    Attributes:
        subspaces: of the model.
        layer: whose states are compared.
    """

    subspaces: Subspaces
    layer: int

    def __call__(self, target: Tensor, central: Tensor) -> Tensor:
        """Return the loss of each row, (batch,).

        Args:
            target: (batch, hidden_size), states of the target language; the gradient flows into
                both, as published.
            central: (batch, hidden_size), states of the same rows in the central language.
        """
        return self.subspaces.project_agnostic(target - central, self.layer).square().mean(-1)


@dataclass(frozen=True)
class SeparateLoss:
    """‖P_s h_l - P_s h_l° - strength·omega_l‖² / d: the target moves along its own direction.

    Attributes:
        subspaces: of the model.
        layer: whose states are moved.
        language: the target language.
        strength: how far to move, in lengths of omega_l.
    """

    subspaces: Subspaces
    layer: int
    language: str
    strength: float = 1.0

    def __call__(self, target: Tensor, reference: Tensor) -> Tensor:
        """Return the loss of each row, (batch,).

        Args:
            target: (batch, hidden_size), states of the model in training.
            reference: (batch, hidden_size), states of the untouched model for the same prompts.
        """
        goal = self.strength * self.subspaces.direction(self.language, self.layer).to(target)
        moved = self.subspaces.project_specific(target - reference, self.layer)
        return (moved - goal).square().mean(-1)


@dataclass(frozen=True)
class RetainLoss:
    """‖mean(h_c) - mean(h_c°)‖² / d, means over real tokens: the central language stays.

    With single tokens' states in place of means, and of any language, each of those stays.
    """

    def __call__(self, central: Tensor, reference: Tensor) -> Tensor:
        """Return the loss of each row, (batch,).

        Args:
            central: (batch, hidden_size), token means or states of the model in training.
            reference: (batch, hidden_size), the same of the untouched model.
        """
        return (central - reference).square().mean(-1)


@dataclass(frozen=True)
class RetainDistributionLoss:
    """mean over tokens of KL(p° ‖ p): the central language goes on in the same words.

    Means of states can stay while the state of a single token, such as the one that begins the
    answer, moves; the distributions of next tokens are what a user meets.
    """

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Return the loss of a prompt, in nats: a scalar.

        Args:
            logits: (n_tokens, vocab_size), of the model in training.
            reference: (n_tokens, vocab_size), of the untouched model.
        """
        now, before = (each.float().log_softmax(-1) for each in (logits, reference))
        return (before.exp() * (before - now)).sum(-1).mean()
