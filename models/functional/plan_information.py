r"""What concepts tell of a hidden plan, and what they cost: information, rate, efficiency, stability.

Legend: N texts, S concept slots, A attributes of the plan.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from models.functional.monitor import plug_in_entropy


def joint_information(concepts: Tensor, plans: Tensor) -> tuple[float, float]:
    """I(C; plan) = H(C) + H(plan) - H(C, plan) and H(plan), nats, from (N, S) and (N, A).

    Each entropy has the Miller-Madow correction. Where nearly every text has concepts of its own the estimate is high
    whatever they say: read it beside `shuffled_information`.
    """
    of_plan = plug_in_entropy(plans)
    return plug_in_entropy(concepts) + of_plan - plug_in_entropy(torch.cat([concepts, plans], -1)), of_plan


def shuffled_information(concepts: Tensor, plans: Tensor) -> tuple[float, float]:
    """The same with every text given another's plan (a fixed shuffle): near 0 where the estimate can be believed."""
    order = torch.randperm(len(plans), generator=torch.Generator().manual_seed(0))
    return joint_information(concepts, plans[order])


def nominal_bits(sizes: Iterable[tuple[int, int, int]]) -> float:
    """R_nom = sum over types of log2 sum_{least <= k <= most} V^k, bits, from (V, least, most) of each type."""
    return sum(math.log2(sum(codes**k for k in range(least, most + 1))) for codes, least, most in sizes)


def efficiency(nats_without: float, nats_with: float, rate: float) -> float:
    """η = G / R_eff: nats that the plan saves the executor, G = NLL(x | u) - NLL(x | z), for each nat of -log p(z | u).

    At most 1 where NLL(x | u) is of a model no worse than the plan's; more means a leak, a weak baseline or noise.
    NaN for a rate of 0.
    """
    return (nats_without - nats_with) / rate if rate > 0 else math.nan


def flip_rate(before: Tensor, after: Tensor) -> float:
    """Share of texts whose concepts (N, S) are no longer the same in every slot."""
    return (before != after).any(-1).double().mean().item()
