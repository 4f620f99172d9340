r"""Both divergences of q_α along α, and the one α at which their means over positions agree.

With d = log π_t - log π_θ: KL(q_α‖π_θ) = (1 - α) E_q d - log Z and KL(q_α‖π_t) = -α E_q d - log Z. Their derivatives by α are
-(1 - α) Var_q d and α Var_q d: the first falls, the second rises.
Legend: N positions, V vocabulary, A values of α.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.functional.qstar import log_ratio

BISECTIONS = 60


class Divergences(NamedTuple):
    """All (A, N), float64: kl_theta = KL(q_α‖π_θ) and kl_target = KL(q_α‖π_t), nats; variance = Var_q d."""

    kl_theta: Tensor
    kl_target: Tensor
    variance: Tensor


def divergences_along(logp_theta: Tensor, logp_t: Tensor, alphas: Tensor) -> Divergences:
    """Log-probabilities (N, V) of both models, -inf where a token is not allowed; alphas (A,) -> `Divergences`.

    q_α is restricted to the tokens that both models allow. Raises UsageError where a position has none.
    """
    theta, target = (logp.double().log_softmax(-1) for logp in (logp_theta, logp_t))  # few digits sum to 1 only nearly
    d, support = log_ratio(theta, target)
    found = []
    for alpha in alphas.tolist():
        logits = torch.where(support, alpha * theta + (1 - alpha) * target, -torch.inf)
        log_z = logits.logsumexp(-1, keepdim=True)
        q = (logits - log_z).exp()
        mean = (q * d).sum(-1)
        variance = (q * (d - mean.unsqueeze(-1)).square()).sum(-1)
        log_z = log_z.squeeze(-1)
        found.append(torch.stack([(1 - alpha) * mean - log_z, -alpha * mean - log_z, variance]))
    return Divergences(*torch.stack(found, 1))


def equal_divergence(alphas: Tensor, kl_theta: Tensor, kl_target: Tensor, variance: Tensor) -> tuple[float, float]:
    """(α*, nats): where two curves on a grid are equal, and what both are there. All (A,), alphas rising from 0 to 1.

    The curves are cubic between two grid points (Hermite), with the derivatives above: the error falls with the fourth power
    of the spacing. Curves that do not cross, as truncated supports allow, have the end that is nearer to equality:
    kl_theta there, or kl_target at α = 1. Equal models have 1/2.
    """
    gap = kl_theta - kl_target
    if bool((gap == 0).all()):
        return 0.5, float(kl_theta[len(gap) // 2])
    if gap[0] <= 0:
        return 0.0, float(kl_theta[0])
    if gap[-1] >= 0:
        return 1.0, float(kl_target[-1])
    k = int((gap > 0).nonzero()[-1])
    left, width = float(alphas[k]), float(alphas[k + 1] - alphas[k])
    slopes = -(1 - alphas) * variance, alphas * variance

    def curves(share: float) -> list[float]:
        """Both divergences at left + share * width."""
        return [
            _hermite(share, width, *map(float, (kl[k], kl[k + 1], slope[k], slope[k + 1])))
            for kl, slope in zip((kl_theta, kl_target), slopes, strict=True)
        ]

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        theta, target = curves(middle)
        low, high = (middle, high) if theta > target else (low, middle)
    return left + low * width, curves(low)[0]


def _hermite(s: float, width: float, y0: float, y1: float, m0: float, m1: float) -> float:
    """The cubic at s in [0, 1] with values y0, y1 and derivatives m0, m1 at the ends of a cell of this width."""
    r = 1 - s
    return (1 + 2 * s) * r * r * y0 + s * r * r * width * m0 + s * s * (3 - 2 * s) * y1 - s * s * r * width * m1
