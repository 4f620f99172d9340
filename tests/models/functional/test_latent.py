"""The mean of the next span by hand, and penalties that see a collapse."""

import pytest
import torch

from models.functional.latent import covariance_penalty, next_span_mean, variance_penalty


def test_mean_of_the_next_span_by_hand():
    hidden = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).view(1, 5, 1)
    assert next_span_mean(hidden, 2).flatten().tolist() == [3.0, 6.0, 12.0, 0.0, 0.0]
    assert next_span_mean(hidden, 5).eq(0).all()
    assert next_span_mean(hidden, 1).flatten().tolist() == [2.0, 4.0, 8.0, 16.0, 0.0]


def test_penalties_see_one_point_and_one_line_and_pass_a_round_cloud():
    cloud = torch.randn(20000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.1
    point, line = torch.zeros_like(cloud), cloud[:, :1].expand(-1, 3)
    assert variance_penalty(cloud) == 0
    assert variance_penalty(point) == pytest.approx(1 - 1e-2)
    assert variance_penalty(line) == 0
    assert covariance_penalty(cloud) < 1e-2
    assert covariance_penalty(line) == pytest.approx(2 * 1.21**2, rel=0.05)
    for few in (cloud[:0], cloud[:1]):  # nothing to spread
        assert variance_penalty(few) == covariance_penalty(few) == 0


def test_covariance_by_hand():
    z = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert covariance_penalty(z) == pytest.approx(2 * 4.0**2 / 2)
