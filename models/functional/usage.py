r"""Are all codes used? The batch's marginal over codes against the uniform distribution.

Legend: N choices, V codes.
"""

import math

import torch
from torch import Tensor


def usage_kl(probabilities: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""KL(p̄ || uniform) = ln V - H(p̄) in nats of the mean p̄ of (N, V) rows; 0 when all codes are used alike.

    Each row may be as sharp as it likes: the mean alone is measured. It carries a gradient to every row. weights (N,): how
    much each row counts; rows that sum to less than 1, such as those that left something out, count that much less.
    """
    if weights is not None:
        probabilities = probabilities * weights.unsqueeze(-1)
    total = probabilities.sum(0)
    tiny = torch.finfo(total.dtype).tiny
    mean = total / total.sum().clamp(min=tiny)
    return math.log(mean.shape[-1]) + (mean * mean.clamp(min=tiny).log()).sum()


def code_perplexity(probabilities: Tensor) -> Tensor:
    """exp H(p̄): how many codes are in use, counted by how much; between 1 and V."""
    return probabilities.shape[-1] * torch.exp(-usage_kl(probabilities))
