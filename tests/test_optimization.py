"""The optimizer: minimises any objective, in an order and on a schedule that are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from polylens.config import OptimizerSettings
from polylens.optimization import optimize, rows_of_step, schedule


class Distance:
    """Squared distance of a weight to the mean of the rows' goals."""

    def __init__(self, weight: torch.nn.Parameter, goals: torch.Tensor) -> None:
        self.weight = weight
        self.goals = goals
        self.seen: list[int] = []

    def backward(self, rows: Sequence[int]) -> tuple[float, dict[str, float]]:
        self.seen += rows
        loss = (self.weight - self.goals[list(rows)]).square().sum(-1).mean()
        loss.backward()
        return float(loss), {"distance": float(loss)}


def test_any_objective_is_minimised_and_each_epoch_visits_every_row_once() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    goals = torch.tensor([[1.0, 2.0, 3.0]]).repeat(5, 1)
    objective = Distance(weight, goals)
    settings = OptimizerSettings(
        learning_rate=0.1, epochs=60, batch_size=2, weight_decay=0.0, warmup_ratio=0.0
    )
    log = optimize({"weight": weight}, objective, len(goals), settings, identity=[])
    torch.testing.assert_close(weight.detach(), goals[0], atol=0.05, rtol=0)
    assert len(log) == 60 * 3
    assert log[-1]["distance"] < 0.01 * log[0]["distance"]
    for epoch in range(60):
        assert sorted(objective.seen[epoch * 5 : (epoch + 1) * 5]) == [0, 1, 2, 3, 4]


def test_each_epoch_has_an_order_of_its_own() -> None:
    first, second = (
        [row for step in steps for row in rows_of_step(step, 64, 8, seed=3)]
        for steps in (range(8), range(8, 16))
    )
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 0.5])
def test_the_schedule_is_that_of_transformers(warmup_ratio: float) -> None:
    n_steps = 25
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = get_cosine_schedule_with_warmup(
        optimizer, -int(-warmup_ratio * n_steps // 1), n_steps
    )
    for step in range(n_steps):
        assert schedule(step, n_steps, warmup_ratio) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
