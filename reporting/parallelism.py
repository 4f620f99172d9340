"""Accuracy under parallelism: how much quality a method keeps as its forward passes give more tokens.

A point is (ρ, y): tokens per forward pass, and accuracy in percent.
"""

import math
from itertools import pairwise

Point = tuple[float, float]

PENALTY = 3.0  # α of the weight
TOLERATED = 5.0  # percent below the accuracy of the least parallel point; what loses more is left out


def accuracy_weight(y: float, best: float, penalty: float = PENALTY) -> float:
    """W(y) = min(exp(-α (1 - y / y_max)), 1)."""
    return 1.0 if y >= best else math.exp(-penalty * (1 - y / best))


def not_dominated(points: list[Point]) -> list[Point]:
    """The points that no other one equals or exceeds in both values, each once, from the smallest ρ on: y falls as ρ grows."""
    kept: list[Point] = []
    for point in sorted(set(points), reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def accuracy_under_parallelism(points: list[Point], best: float, penalty: float = PENALTY) -> float:
    """AUP, the weighted area under accuracy over tokens per forward pass (Qian et al., d3LLM, arXiv 2601.07568).

    ρ_1 y_1 + Σ_{i>1} (ρ_i - ρ_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2, over the points with y_i ≥ y_1 - 5, in the order
    of ρ. points: one or more, ρ above 0. best: y_max, the highest accuracy that any compared method reaches.
    """
    ordered = sorted(points)
    kept = [(rho, y) for rho, y in ordered if y >= ordered[0][1] - TOLERATED]
    area = kept[0][0] * kept[0][1]
    for (rho_before, y_before), (rho, y) in pairwise(kept):
        heights = y * accuracy_weight(y, best, penalty) + y_before * accuracy_weight(y_before, best, penalty)
        area += (rho - rho_before) * heights / 2
    return area
