"""Divergences of q_α along α: closed forms of two tokens, and α* by brute force."""

import pytest
import torch

from models.functional.errors import UsageError
from models.functional.qstar import solve_alpha
from models.functional.qstar_curve import divergences_along, equal_divergence

GRID = torch.linspace(0, 1, 41, dtype=torch.float64)
# probabilities of the first of two tokens, one pair a position
THETA, TARGET = torch.tensor([0.9, 0.6, 0.01, 0.3]).double(), torch.tensor([0.1, 0.3, 0.5, 0.35]).double()


def two(first):
    return torch.stack([first, 1 - first], -1).log()


def binary_kl(p, q):
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def exact(alpha):
    """Both divergences of q_α, whose log-odds are a weighted mean of the models'."""
    q = torch.sigmoid(alpha * torch.logit(THETA) + (1 - alpha) * torch.logit(TARGET))
    return binary_kl(q, THETA), binary_kl(q, TARGET)


def star_of(alphas):
    found = divergences_along(two(THETA), two(TARGET), alphas)
    return equal_divergence(alphas, *(part.mean(-1) for part in found))


def test_the_curves_of_two_tokens_are_their_closed_form():
    found = divergences_along(two(THETA), two(TARGET), GRID)
    wanted = [torch.stack(part) for part in zip(*(exact(a) for a in GRID), strict=True)]
    torch.testing.assert_close(found.kl_theta, wanted[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(found.kl_target, wanted[1], atol=1e-12, rtol=0)
    # control: an arithmetic mixture has other curves
    mixed = torch.stack([binary_kl(a * THETA + (1 - a) * TARGET, THETA) for a in GRID])
    assert (found.kl_theta - mixed).abs().max() > 0.01


def test_the_star_is_where_brute_force_finds_equal_means():
    low, high = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        theta, target = (part.mean() for part in exact(middle))
        low, high = (middle, high) if theta > target else (low, middle)
    alpha, kl = star_of(GRID)
    assert alpha == pytest.approx(float(low), abs=1e-6)
    assert kl == pytest.approx(float(exact(low)[0].mean()), abs=1e-6)
    assert kl == pytest.approx(float(exact(low)[1].mean()), abs=1e-6)
    # controls: straight lines between grid points miss it, and so does the mean of α over positions
    gap = [float((theta - target).mean()) for theta, target in (exact(a) for a in GRID)]
    k = max(n for n, value in enumerate(gap) if value > 0)
    straight = float(GRID[k]) + 0.025 * gap[k] / (gap[k] - gap[k + 1])
    assert abs(straight - float(low)) > 1e-5
    assert abs(float(solve_alpha(two(THETA), two(TARGET)).alpha.mean()) - float(low)) > 0.005


def test_the_star_minimises_the_mean_of_log_z():
    alpha, _ = star_of(GRID)
    fine = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    log_z = [(a * two(THETA) + (1 - a) * two(TARGET)).logsumexp(-1).mean() for a in fine]
    assert alpha == pytest.approx(float(fine[torch.stack(log_z).argmin()]), abs=1e-4)


def test_the_error_falls_with_the_fourth_power_of_the_spacing():
    fine, _ = star_of(torch.linspace(0, 1, 2001, dtype=torch.float64))
    errors = [abs(star_of(torch.linspace(0, 1, n, dtype=torch.float64))[0] - fine) for n in (6, 21)]
    assert errors[1] < errors[0] / 50


def test_the_derivatives_of_the_curves_are_those_of_finite_differences():
    a, h = 0.3, 1e-5
    below, at, above = (
        divergences_along(two(THETA), two(TARGET), torch.tensor([x], dtype=torch.float64)) for x in (a - h, a, a + h)
    )
    torch.testing.assert_close((above.kl_theta - below.kl_theta) / (2 * h), -(1 - a) * at.variance, atol=1e-6, rtol=0)
    torch.testing.assert_close((above.kl_target - below.kl_target) / (2 * h), a * at.variance, atol=1e-6, rtol=0)


def test_ends_equal_models_and_common_tokens():
    inf = torch.inf
    a = torch.tensor([[0.6, 0.2, 0.2]]).double().log()
    b = torch.tensor([[0.7, 0.3, -inf]]).double()
    b[0, :2] = b[0, :2].log()
    found = divergences_along(a, b, GRID)
    assert torch.isfinite(found.kl_theta).all()
    assert equal_divergence(GRID, *(part.mean(-1) for part in found))[0] == solve_alpha(a, b).alpha.item() == 1.0
    found = divergences_along(b, a, GRID)
    assert equal_divergence(GRID, *(part.mean(-1) for part in found))[0] == 0.0
    found = divergences_along(a, a, GRID)
    alpha, kl = equal_divergence(GRID, *(part.mean(-1) for part in found))
    assert alpha == 0.5
    assert kl == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(UsageError, match="no common token"):
        divergences_along(torch.tensor([[0.0, -inf]]), torch.tensor([[-inf, 0.0]]), GRID)
