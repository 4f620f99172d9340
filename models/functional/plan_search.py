r"""Scores of candidate plans of a text, margin of the best, and staleness of an earlier choice.

.. math:: S(z) = \log p(x \mid z) + \lambda \log p(z \mid u)

lambda = 1 finds the most probable plan given text and prompt. log p(x | z) is a sum over tokens, so that it outweighs the prior
where texts are long; a larger lambda balances that.
Legend: B texts, K candidates, S slots.
"""

import torch
from torch import Tensor


def plan_score(log_text: Tensor, log_plan: Tensor, prior_weight: float) -> Tensor:
    """S(z) in nats from log p(x | z) and log p(z | u) of whole texts and plans, any shape."""
    return log_text + prior_weight * log_plan


def repeats(candidates: Tensor) -> Tensor:
    """Which candidates (B, K, S) equal an earlier one of the same text, (B, K) bool."""
    same = (candidates.unsqueeze(2) == candidates.unsqueeze(1)).all(-1)  # (B, K, K)
    return same.tril(-1).any(-1)


def margin(scores: Tensor) -> Tensor:
    """S(z_1) - S(z_2) of the best and the second best of (B, K), nats; inf where there is no second. -inf: not a candidate."""
    best = scores.topk(min(2, scores.shape[-1]), dim=-1).values
    if best.shape[-1] == 1:
        return torch.full_like(best[..., 0], torch.inf)
    return best[..., 0] - best[..., 1]


def staleness(new: Tensor, old: Tensor) -> Tensor:
    """S(z_new) - S(z_old) in nats, both under the current weights; at least 0."""
    return new - old


def next_interval(interval: int, gap: float, tolerance: float, least: int, most: int) -> int:
    """Steps until plans are searched again: halved where mean staleness is above `tolerance`, times 1.5 below half of it."""
    if gap > tolerance:
        interval = interval // 2
    elif gap < tolerance / 2:
        interval = interval * 3 // 2
    return min(max(interval, least), most)
