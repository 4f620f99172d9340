"""The curve of a test: means over all positions, whatever the batches, chunks and ranks."""

import pytest
import torch

from models.functional.qstar import solve_alpha
from models.functional.qstar_curve import divergences_along
from models.speculative import alpha_curve
from models.speculative.alpha_curve import AlphaCurve


def models(rows=7, vocabulary=5):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, rows, vocabulary, generator=draw).log_softmax(-1).unbind()


def alone(values):
    return values


def test_means_are_over_all_positions_of_all_batches(monkeypatch):
    theta, target = models()
    whole, parts = AlphaCurve(11), AlphaCurve(11)
    whole.add(theta, target)
    monkeypatch.setattr(alpha_curve, "CHUNK_NUMBERS", 10)  # two positions at a time
    for rows in (slice(0, 5), slice(5, 7)):
        parts.add(theta[rows], target[rows])
    found, wanted = parts.record(alone), divergences_along(theta, target, parts.alphas)
    assert found["positions"] == 7
    assert found["kl_theta"] == pytest.approx(wanted.kl_theta.mean(-1).tolist(), abs=1e-12)
    assert found["kl_target"] == pytest.approx(wanted.kl_target.mean(-1).tolist(), abs=1e-12)
    solved = solve_alpha(theta, target)
    assert found["alpha_mean"] == pytest.approx(float(solved.alpha.mean()), abs=1e-9)
    assert found["chernoff_mean"] == pytest.approx(float(solved.chernoff.mean()), abs=1e-9)
    assert found["alpha_star"] == pytest.approx(whole.record(alone)["alpha_star"], abs=1e-9)
    # control: a mean of batches' means would weigh 5 and 2 positions alike
    of_batches = (wanted.kl_theta[:, :5].mean(-1) + wanted.kl_theta[:, 5:].mean(-1)) / 2
    assert (of_batches - torch.tensor(found["kl_theta"])).abs().max() > 1e-3


def test_ranks_add_their_positions():
    theta, target = models()
    whole, own, other = AlphaCurve(11), AlphaCurve(11), AlphaCurve(11)
    whole.add(theta, target)
    own.add(theta[:2], target[:2])
    other.add(theta[2:], target[2:])
    numbers = []
    other.record(lambda values: numbers.extend(values) or values)
    found = own.record(lambda values: [a + b for a, b in zip(values, numbers, strict=True)])
    assert found["alpha_star"] == pytest.approx(whole.record(alone)["alpha_star"], abs=1e-9)
    assert found["positions"] == 7


def test_nothing_is_recorded_of_nothing():
    assert AlphaCurve(11).record(alone) == {}
    curve = AlphaCurve(11)
    curve.add(*models())
    curve.reset()
    assert curve.record(alone) == {}
