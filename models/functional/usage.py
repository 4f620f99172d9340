r"""Use of codes: the batch's marginal over codes against the uniform distribution.

Legend: N choices, V codes.
"""

import math

import torch
from torch import Tensor


def usage_kl(probabilities: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""KL(p̄ || uniform) = ln V - H(p̄) in nats of the mean p̄ of (N, V) rows; 0 where all codes are equally frequent.

    Only the mean is measured; single rows may be sharp. Every row gets a gradient. weights (N,): of each row. A row that sums
    to less than 1 counts less.
    """
    if weights is not None:
        probabilities = probabilities * weights.unsqueeze(-1)
    total = probabilities.sum(0)
    tiny = torch.finfo(total.dtype).tiny
    mean = total / total.sum().clamp(min=tiny)
    return math.log(mean.shape[-1]) + (mean * mean.clamp(min=tiny).log()).sum()


def code_perplexity(probabilities: Tensor) -> Tensor:
    """exp H(p̄): the effective number of codes in use, between 1 and V."""
    return probabilities.shape[-1] * torch.exp(-usage_kl(probabilities))
