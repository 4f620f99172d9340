"""Multipliers against a problem whose solution is known, and their counts by hand."""

import pytest
import torch

from models.functional.quota import LIMIT, QuotaMultipliers


def alone(own):
    return own.unsqueeze(0)


def settled(gain, slope=1.5, target=2.0, steps=4000):
    """The mean where gradient descent on slope * m + (m - target)² + multiplier * (m - target) comes to rest."""
    mean, multipliers = torch.zeros(1, dtype=torch.float64), QuotaMultipliers(1, gain)
    for _ in range(steps):
        gradient = slope + 2 * (mean - target) + multipliers.values
        multipliers.add(mean - target, torch.ones(1))
        multipliers.apply(alone)
        mean = mean - 0.05 * gradient
    return float(mean), float(multipliers.values)


def test_a_multiplier_rests_at_the_target_and_a_penalty_alone_does_not():
    mean, multiplier = settled(gain=0.02)
    assert mean == pytest.approx(2.0, abs=1e-6)
    assert multiplier == pytest.approx(-1.5, abs=1e-6)  # what holds against the slope
    mean, multiplier = settled(gain=0.0)
    assert mean == pytest.approx(2.0 - 1.5 / 2, abs=1e-6)
    assert multiplier == 0


def test_a_target_that_cannot_be_reached_does_not_let_it_grow_for_ever():
    multipliers = QuotaMultipliers(1, 0.5)
    for _ in range(100):
        multipliers.add(torch.tensor([1.0]), torch.tensor([1.0]))
        multipliers.apply(alone)
    assert float(multipliers.values) == LIMIT
    multipliers.add(torch.tensor([-1.0]), torch.tensor([1.0]))
    multipliers.apply(alone)
    assert float(multipliers.values) == LIMIT - 0.5  # and it comes back at once


def test_micro_batches_and_ranks_weigh_as_many_values_as_they_have():
    """Excess 3 of 4 values and 1 of 2, on each of two ranks; the second constraint has no values."""
    multipliers = QuotaMultipliers(2, 0.3)
    multipliers.add(torch.tensor([3.0, 0.0]), torch.tensor([4, 0]))
    multipliers.add(torch.tensor([1.0, 0.0]), torch.tensor([2, 0]))
    multipliers.apply(lambda own: torch.stack([own, 4 * own]))
    assert multipliers.values.tolist() == pytest.approx([0.3 * 20 / 30, 0.0])
    multipliers.apply(alone)  # counted once
    assert multipliers.values.tolist() == pytest.approx([0.2, 0.0])


def test_a_state_is_a_copy_and_a_checkpoint_may_lack_it():
    multipliers = QuotaMultipliers(1, 1.0)
    multipliers.values += 0.75
    state = multipliers.state()
    multipliers.values += 1.0
    multipliers.load(state)
    assert multipliers.values.tolist() == [0.75]
    multipliers.load(None)
    assert multipliers.values.tolist() == [0.0]
