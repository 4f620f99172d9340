"""A curriculum by length: short texts first.

Legend: B texts, R tokens.
"""

import torch
from torch import Tensor


def text_lengths(text: Tensor, end: int) -> Tensor:
    """Tokens of each text (B, R) before the end tokens that fill it up, (B,)."""
    return text.shape[1] - (text == end).long().flip(-1).cumprod(-1).sum(-1)


def length_limit(progress: float, share: float, longest: int) -> float:
    """The longest text that counts: a quarter of `longest` at first, `longest` after `share` of the steps, linear between."""
    return longest if share <= 0 or progress >= share else longest * (0.25 + 0.75 * progress / share)


def mean_of_short(values: Tensor, lengths: Tensor, limit: float) -> Tensor:
    """Mean of values (B,) over texts no longer than `limit`; where there are none, over the shortest of them."""
    counts = lengths <= max(limit, float(lengths.min()))
    return torch.where(counts, values, 0.0).sum() / counts.sum()
