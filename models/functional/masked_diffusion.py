r"""Masked diffusion: the forward process that hides tokens and the loss that learns to put them back.

Nie et al., Large Language Diffusion Models (LLaDA, 2025); Sahoo et al., MDLM (2024).
Legend: B batch, L length, V vocabulary; t in [0, 1] with t = 1 all masked, t = 0 clean.
"""

from typing import TypeVar

import torch
from torch import Generator, Tensor

from models.functional.errors import UsageError
from models.functional.nll import chosen_nll
from models.functional.uniform import uniform

Number = TypeVar("Number", float, Tensor)


def mask_probability(t: Number, eps: float = 1e-3) -> Number:
    """p(t) = (1 - eps) t + eps: the chance that a token is masked at time t; never 0, so that 1/p stays finite."""
    return (1 - eps) * t + eps


def require_least_probability(eps: float) -> None:
    """Raise UsageError for an eps with which p(t) is no probability, or 0."""
    if not 0 < eps <= 1:
        raise UsageError(f"module.objective.eps={eps} must lie above 0 and at most at 1, such as 1e-3")


def antithetic_times(n: int, generator: Generator, device: torch.device) -> Tensor:
    """n times in [0, 1), each U(0, 1) on its own and together one per n-th of the interval (lower loss variance)."""
    offset = uniform(1, generator=generator)
    return (torch.arange(n, device=device, dtype=offset.dtype) / n + offset) % 1.0


def mask_tokens(x0: Tensor, maskable: Tensor, p: Tensor, mask_id: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Hide each maskable token independently with probability p.

    x0 (B, L) ids; maskable (B, L) bool; p (B,), (B, 1) or (B, L). Returns x_t (B, L) and masked (B, L) bool.
    """
    draws = uniform(*x0.shape, generator=generator)
    masked = maskable & (draws < p.reshape(len(x0), -1))
    return torch.where(masked, mask_id, x0), masked


def row_of_masked(masked: Tensor) -> Tensor:
    """(B, L) bool -> (M,): the row of each masked position, in row-major order."""
    return masked.nonzero()[:, 0]


def masked_diffusion_nll(masked_logits: Tensor, x0: Tensor, masked: Tensor, p: Tensor) -> Tensor:
    """Cross entropy of every masked token divided by its p, scattered back: (B, L), 0 where not masked.

    masked_logits (M, V) are the logits of the M = masked.sum() hidden positions, in row-major order; p (B,) or (B, L).
    Its sum over a row is an unbiased draw of the row's upper bound on -log p(x0), in nats.
    """
    return chosen_nll(masked_logits, x0, masked) * (1.0 / p).reshape(len(x0), -1)


def random_length(length: int, generator: Generator, probability: float = 0.01) -> int:
    """LLaDA's pre-training cut: with this probability a whole batch is shortened to U{1, ..., length} tokens."""
    if uniform(1, generator=generator).item() >= probability:
        return length
    return int(torch.randint(1, length + 1, (1,), generator=generator, device=generator.device).item())
