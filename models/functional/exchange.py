"""Wrong conditions for texts: those of other texts, drawn at random or the nearest one.

Legend: N texts, F features of a condition.
"""

import torch
from torch import Generator, Tensor


def derangement(n: int, generator: Generator) -> Tensor:
    """For each of n texts another one whose condition it gets, (n,): a random cycle, so never its own where n > 1.

    Every condition is used once.
    """
    cycle = torch.randperm(n, generator=generator, device=generator.device)
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(-1)
    return other


def nearest_other(features: Tensor) -> Tensor:
    """The nearest condition that differs from a text's own, (N,) from features (N, F); its own where all are alike."""
    distance = torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.masked_fill(distance == 0, torch.inf)
    own = torch.arange(len(features), device=features.device)
    return torch.where(distance.isinf().all(-1), own, distance.argmin(-1))
