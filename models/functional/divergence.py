"""How far one distribution is from another.

Legend: V outcomes.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_NUMBERS = 2**25  # log-probabilities that are worked on together


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p - log q) in nats from log-probabilities (..., V) -> (...); p = 0 adds nothing."""
    p = logp.exp()
    return torch.where(p > 0, p * (logp - logq), 0.0).sum(-1)


def by_positions(value: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """value(*inputs) of inputs (..., V), (...), worked out on `CHUNK_NUMBERS` numbers at a time.

    value: a figure of each position by itself. Beside the inputs and their gradients, memory is that of one part: the
    backward pass computes each part again. Values and gradients are those of all positions at once.
    """
    shape = inputs[0].shape
    if inputs[0].numel() <= CHUNK_NUMBERS or any(part.shape != shape for part in inputs):
        return value(*inputs)
    size = max(1, CHUNK_NUMBERS // shape[-1])
    parts = zip(*(part.flatten(0, -2).split(size) for part in inputs), strict=True)
    found = [checkpoint(value, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(found).view(shape[:-1])
