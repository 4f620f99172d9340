r"""The length of a sequence of concepts that any slot may end.

stop (..., K): for each of K slots the probability that it ends the sequence, or 0 and 1 with a straight-through gradient. Slots
after the end count as stopped (1).

.. math:: E[n] = \sum_k \prod_{j \le k} (1 - s_j)
"""

import torch
from torch import Tensor


def expected_length(stop: Tensor) -> Tensor:
    """Expected number of concepts before the end, (..., K) -> (...), between 0 and K."""
    return (1 - stop).cumprod(-1).sum(-1)


def eos_loss(stop: Tensor) -> Tensor:
    """-log P(the sequence ends by itself within its K slots) in nats, (..., K) -> (...)."""
    never = torch.log1p(-stop.clamp(max=1 - torch.finfo(stop.dtype).eps)).sum(-1)
    return -torch.log(-torch.expm1(never.clamp(max=-torch.finfo(stop.dtype).eps)))


def quota_loss(lengths: Tensor, quota: float, multiplier: float = 0.0) -> Tensor:
    """(mean length - quota)² over a batch of lengths (B,). Only the mean is bound, not single texts.

    multiplier: adds multiplier * (mean length - quota), see models/functional/quota.py.
    """
    excess = lengths.mean() - quota
    return excess.square() + multiplier * excess if multiplier else excess.square()
