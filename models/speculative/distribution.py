"""q* of the next token, from the log-probabilities of both models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.functional.errors import UsageError
from models.functional.qstar import mix, solve_alpha, truncate

# (log pi_theta (..., V), log pi_t (..., V)) -> alpha (...)
Weight = Callable[[Tensor, Tensor], Tensor]


class NextTokenDist(NamedTuple):
    """log_q, theta, target (..., V): q* after top-k and top-p, and both models. alpha (...): the weight of π_θ.

    chernoff (...): C = -log Z(alpha), nats.
    """

    log_q: Tensor
    theta: Tensor
    target: Tensor
    alpha: Tensor
    chernoff: Tensor

    def at(self, k: int | slice) -> "NextTokenDist":
        """Position(s) k of the second dimension."""
        return NextTokenDist(*(part[:, k] for part in self))


@dataclass(frozen=True)
class MixtureDist:
    """(theta (..., V), target (..., V)) -> `NextTokenDist`.

    theta_weight: α as a number, or as a function of both models; None solves for equal divergences at every position.
    temperature acts on both models before mixing (see `tempered`), top_k and top_p on q* after it.
    """

    theta_weight: float | Weight | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        weight = self.theta_weight
        if weight is not None and not callable(weight) and not 0 <= weight <= 1:
            raise UsageError(f"theta_weight={weight} must lie between 0 and 1, or be null for equal divergences")
        if self.temperature <= 0:
            raise UsageError(f"temperature={self.temperature} must be above 0; top_k=1 takes q*'s most probable token")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k={self.top_k} must be at least 1, or null for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} must be above 0 and at most 1, or null for all tokens")

    def tempered(self, logp: Tensor) -> Tensor:
        """A model's log-probabilities (..., V) at the temperature."""
        return logp if self.temperature == 1.0 else (logp / self.temperature).log_softmax(-1)

    def proposal(self, logp: Tensor) -> Tensor:
        """What a drafter of q* draws from: its log-probabilities (..., V) at the temperature, after top-k and top-p."""
        return self.truncated(self.tempered(logp))

    def __call__(self, theta: Tensor, target: Tensor) -> NextTokenDist:
        """theta, target (..., V): log-probabilities at the temperature. Raises UsageError where they share no token."""
        if theta is target and isinstance(self.theta_weight, int | float):  # one model is q* of itself at any weight
            alpha = torch.full(theta.shape[:-1], float(self.theta_weight), dtype=theta.dtype, device=theta.device)
            return NextTokenDist(self.truncated(theta), theta, target, alpha, torch.zeros_like(alpha))
        if self.theta_weight is None:
            alpha = solve_alpha(theta, target).alpha
        elif callable(self.theta_weight):
            alpha = self.theta_weight(theta, target)
        else:
            alpha = torch.tensor(self.theta_weight, dtype=theta.dtype, device=theta.device)
        alpha = alpha.to(theta.dtype).expand(theta.shape[:-1])
        log_q, log_z = mix(theta, target, alpha)
        return NextTokenDist(self.truncated(log_q), theta, target, alpha, -log_z)

    def truncated(self, log_q: Tensor) -> Tensor:
        """log q* (..., V) after top-k and top-p."""
        return log_q if self.top_k is None and self.top_p is None else truncate(log_q, self.top_k, self.top_p)
