"""How far one distribution is from another.

Legend: V outcomes.
"""

import torch
from torch import Tensor


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p - log q) in nats from log-probabilities (..., V) -> (...); p = 0 adds nothing."""
    p = logp.exp()
    return torch.where(p > 0, p * (logp - logq), 0.0).sum(-1)
