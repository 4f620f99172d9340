"""How far q_α is from both models along α, in the mean over the positions of test texts.

Legend: M positions that count, V vocabulary, A values of α.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.functional.qstar import solve_alpha
from models.functional.qstar_curve import divergences_along, equal_divergence

CHUNK_NUMBERS = 2**22  # log-probabilities of a model that are worked on together, in float64


class AlphaCurve:
    """Sums over batches. points: values of α, evenly from 0 to 1; 0 measures nothing."""

    def __init__(self, points: int) -> None:
        self.alphas = torch.linspace(0, 1, points, dtype=torch.float64)
        self.reset()

    def reset(self) -> None:
        self._sums = torch.zeros(3, len(self.alphas), dtype=torch.float64)  # both divergences and the variance of d
        self._solved = torch.zeros(2, dtype=torch.float64)  # α and C, solved at each position
        self._positions = 0

    @torch.no_grad()
    def add(self, theta: Tensor, target: Tensor) -> None:
        """log-probabilities (M, V) of both models at the same positions, at the temperature of decoding."""
        rows = max(1, CHUNK_NUMBERS // theta.shape[-1])
        for own, other in zip(theta.split(rows), target.split(rows), strict=True):
            self._sums += torch.stack(divergences_along(own, other, self.alphas)).sum(-1).cpu()
            solved = solve_alpha(own, other)
            self._solved += torch.stack([solved.alpha.sum(), solved.chernoff.sum()]).cpu()
            self._positions += len(own)

    def record(self, add: Callable[[list[float]], list[float]]) -> dict[str, Any]:
        """The curve as a part of a run's record, {} where nothing was measured; nats, means over positions.

        alphas, kl_theta, kl_target: the curve. alpha_star, kl_star: the one α at which both means are equal, and their value.
        alpha_mean, chernoff_mean: of α and C solved at each position, as decoding does. add: sums numbers over ranks.
        """
        numbers = add([*self._sums.flatten().tolist(), *self._solved.tolist(), float(self._positions)])
        positions = numbers.pop()
        if not positions or not len(self.alphas):
            return {}
        *means, alpha, chernoff = (value / positions for value in numbers)
        kl_theta, kl_target, variance = torch.tensor(means, dtype=torch.float64).view(3, -1)
        alpha_star, kl_star = equal_divergence(self.alphas, kl_theta, kl_target, variance)
        return {
            "alphas": self.alphas.tolist(),
            "kl_theta": kl_theta.tolist(),
            "kl_target": kl_target.tolist(),
            "alpha_star": alpha_star,
            "kl_star": kl_star,
            "alpha_mean": alpha,
            "chernoff_mean": chernoff,
            "positions": int(positions),
        }
