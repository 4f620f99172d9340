r"""Information of concepts about a hidden plan, rate, efficiency, stability.

Legend: N texts, S concept slots, A attributes of the plan.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from models.functional.monitor import plug_in_entropy


def joint_information(concepts: Tensor, plans: Tensor) -> tuple[float, float]:
    """I(C; plan) = H(C) + H(plan) - H(C, plan) and H(plan), nats, from (N, S) and (N, A).

    Each entropy has the Miller-Madow correction. Where nearly every text has different concepts the estimate is
    too high: compare it with `shuffled_information`.
    """
    of_plan = plug_in_entropy(plans)
    return plug_in_entropy(concepts) + of_plan - plug_in_entropy(torch.cat([concepts, plans], -1)), of_plan


def shuffled_information(concepts: Tensor, plans: Tensor) -> tuple[float, float]:
    """The same with plans shuffled between texts (a fixed shuffle): near 0 where the estimate has little bias."""
    order = torch.randperm(len(plans), generator=torch.Generator().manual_seed(0))
    return joint_information(concepts, plans[order])


def nominal_bits(sizes: Iterable[tuple[int, int, int]]) -> float:
    """R_nom = sum over types of log2 sum_{least <= k <= most} V^k, bits, from (V, least, most) of each type."""
    return sum(math.log2(sum(codes**k for k in range(least, most + 1))) for codes, least, most in sizes)


def efficiency(nats_without: float, nats_with: float, rate: float) -> float:
    """η = G / R_eff: the executor's gain G = NLL(x | u) - NLL(x | z) for each nat of the rate -log p(z | u).

    At most 1 where NLL(x | u) is of a model that is no worse than the executor; more means a leak, a weak baseline or noise.
    NaN for a rate of 0.
    """
    return (nats_without - nats_with) / rate if rate > 0 else math.nan


def code_ceiling(texts: Tensor, given: Tensor, weights: Tensor, codes: Tensor) -> tuple[float, float]:
    r"""Rate E_u H(z | u) and gain E_u H(x | u) - H(x | z), nats, of codes z = f(x) with the best possible prior and executor.

    .. math:: \eta^* = \frac{H(z) - I(x; u)}{H(z) - I(z; u)}

    The executor reads z and no prompt. So a code is efficient where it keeps the text's information about the prompt, and every
    code that is different for all texts is efficient.
    texts (T,): p(x); given (U, T): p(x | u) of each prompt, with weights (U,) that sum to 1; codes (T,): the number of each
    text's code.
    """
    members = torch.zeros(len(codes), int(codes.max()) + 1, dtype=given.dtype).scatter_(1, codes.unsqueeze(1), 1.0)
    of_codes, of_texts = (weights @ entropy(p) for p in (given @ members, given))
    return float(of_codes), float(of_texts - entropy(texts) + entropy(texts @ members))


def entropy(p: Tensor) -> Tensor:
    """-sum p log p over the last dimension, nats; 0 log 0 is 0."""
    return -torch.special.xlogy(p, p).sum(-1)


def flip_rate(before: Tensor, after: Tensor) -> float:
    """Share of texts whose concepts (N, S) changed in any slot."""
    return (before != after).any(-1).double().mean().item()
