r"""Geometric mixtures of two Gaussians in closed form.

Λ = Σ^-1; q_α has Λ_q = α Λ_θ + (1 - α) Λ_t and Λ_q μ_q = α Λ_θ μ_θ + (1 - α) Λ_t μ_t.
Legend: D dimensions; all in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """mean (D,), cov (D, D)."""

    mean: Tensor
    cov: Tensor

    def log_density(self, x: Tensor) -> Tensor:
        """log density (...) at x (..., D), nats."""
        return torch.distributions.MultivariateNormal(self.mean, self.cov).log_prob(x)


def kl_gaussian(p: Gaussian, q: Gaussian) -> float:
    """KL(p || q), nats."""
    normal = torch.distributions.MultivariateNormal
    return float(torch.distributions.kl_divergence(normal(p.mean, p.cov), normal(q.mean, q.cov)))


def geometric_mixture(theta: Gaussian, target: Gaussian, alpha: float) -> Gaussian:
    """norm(π_θ^α π_t^(1-α)), which is Gaussian again."""
    a, b = alpha * torch.linalg.inv(theta.cov), (1 - alpha) * torch.linalg.inv(target.cov)
    cov = torch.linalg.inv(a + b)
    return Gaussian(cov @ (a @ theta.mean + b @ target.mean), cov)


def gaussian_alpha(theta: Gaussian, target: Gaussian) -> tuple[float, float]:
    """(α*, C): KL(q‖π_θ) = KL(q‖π_t) = C nats at α*. By bisection, as KL(q‖π_θ) - KL(q‖π_t) falls with α."""
    low, high = 0.0, 1.0
    for _ in range(50):
        alpha = (low + high) / 2
        q = geometric_mixture(theta, target, alpha)
        if kl_gaussian(q, theta) > kl_gaussian(q, target):
            low = alpha
        else:
            high = alpha
    return alpha, kl_gaussian(q, theta)
