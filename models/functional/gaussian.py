r"""Geometric mixtures of two Gaussians in closed form: the study where q* can be drawn and checked by hand.

Λ = Σ^-1; q_α has Λ_q = α Λ_θ + (1 - α) Λ_t and Λ_q μ_q = α Λ_θ μ_θ + (1 - α) Λ_t μ_t.
Legend: D dimensions; all in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    mean: Tensor  # (D,)
    cov: Tensor  # (D, D)

    def log_density(self, x: Tensor) -> Tensor:
        """(..., D) -> (...), nats."""
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
    """(α*, C): where KL(q‖π_θ) = KL(q‖π_t), and that value in nats; by bisection, since the difference falls with α."""
    low, high = 0.0, 1.0
    for _ in range(50):
        alpha = (low + high) / 2
        q = geometric_mixture(theta, target, alpha)
        if kl_gaussian(q, theta) > kl_gaussian(q, target):
            low = alpha
        else:
            high = alpha
    return alpha, kl_gaussian(q, theta)
