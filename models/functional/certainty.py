"""Entropy and largest probability of choices, and whether all texts choose alike.

Legend: B texts, S slots, W choices of a slot.
"""

import torch
from torch import Tensor

UNLIKELY = -1e4  # the log-probability of what cannot be chosen lies below


def certainty(log_p: Tensor, counts: Tensor) -> dict[str, float]:
    """Means over slots that count (B, S) bool, from log-probabilities (B, S, W); {} where none counts.

    entropy: nats; max_prob; entropy_share: of the largest entropy that the slot's possible choices could have, 0 to 1;
    usage: the same share of the entropy of each slot's mean distribution over texts, low where all texts choose alike.
    """
    if not bool(counts.any()):
        return {}
    log_p = log_p.double()
    p = log_p.exp()
    largest = (log_p > UNLIKELY).sum(-1).clamp(min=2).log()
    entropy = -torch.xlogy(p, p).sum(-1)
    weights = counts.double()
    of_mean = (p * weights.unsqueeze(-1)).sum(0) / weights.sum(0).clamp(min=1).unsqueeze(-1)  # (S, W)
    usage = -torch.xlogy(of_mean, of_mean).sum(-1) / largest.masked_fill(~counts, 0).amax(0).clamp(min=1e-9)
    return {
        "entropy": entropy[counts].mean().item(),
        "max_prob": p.amax(-1)[counts].mean().item(),
        "entropy_share": (entropy / largest)[counts].mean().item(),
        "usage": usage[counts.any(0)].mean().item(),
    }
