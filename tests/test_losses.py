"""Losses equal values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from polylens.losses import AlignLoss, RetainDistributionLoss, RetainLoss, SeparateLoss
from polylens.subspaces import Subspaces, probe_subspaces


@pytest.fixture
def subspaces() -> Subspaces:
    """Agnostic axis: the first; specific axis: the second; omega of sw: (0, -2, 0)."""
    return probe_subspaces(
        {
            "en": torch.tensor([3.0, 1.0, 0.0]).expand(2, 1, 3),
            "sw": torch.tensor([3.0, -1.0, 0.0]).expand(2, 1, 3),
        },
        central="en",
    )


def test_align_reads_the_agnostic_axis_alone(subspaces: Subspaces) -> None:
    target = torch.tensor([[5.0, 100.0, 100.0], [1.0, 0.0, 0.0]])
    central = torch.tensor([[2.0, 0.0, 0.0], [1.0, 9.0, 9.0]])
    # row 1: 3² / 3 = 3; row 2: 0
    assert AlignLoss(subspaces, 0)(target, central).tolist() == pytest.approx([3, 0])


def test_separate_asks_for_strength_times_omega(subspaces: Subspaces) -> None:
    reference = torch.tensor([[7.0, 7.0, 7.0]])
    # Nothing moved: ‖2 · (0, -2, 0)‖² / 3 = 16 / 3.
    loss = SeparateLoss(subspaces, 0, "sw", strength=2.0)
    assert loss(reference, reference).item() == pytest.approx(16 / 3)
    # Moved all the way, and elsewhere at will.
    moved = reference + torch.tensor([[50.0, -4.0, 50.0]])
    assert loss(moved, reference).item() == pytest.approx(0)
    assert SeparateLoss(subspaces, 0, "sw", 0.0)(reference, reference).item() == 0


def test_retain_is_a_mean_square() -> None:
    now, before = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert RetainLoss()(now, before).tolist() == pytest.approx([(1 + 4) / 2, (0 + 4) / 2])


def test_retained_distributions_are_a_divergence_in_nats() -> None:
    before, now = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    loss = RetainDistributionLoss()(now.log(), before.clamp(min=1e-30).log())
    assert loss.item() == pytest.approx((first + math.log(2)) / 2, rel=1e-5)
    assert RetainDistributionLoss()(now.log(), now.log() + 3.0).item() == pytest.approx(0, abs=1e-6)


def test_align_pulls_both_ends(subspaces: Subspaces) -> None:
    target = torch.tensor([[5.0, 0.0, 0.0]], requires_grad=True)
    central = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    AlignLoss(subspaces, 0)(target, central).sum().backward()
    assert target.grad is not None
    assert central.grad is not None
    torch.testing.assert_close(target.grad, -central.grad)
    torch.testing.assert_close(target.grad, torch.tensor([[2.0, 0.0, 0.0]]))
