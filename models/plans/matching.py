"""Which type of concepts encodes which attribute of a hidden plan, how well, and whether swapping a type changes that alone.

Types are matched to attributes one to one (Hungarian). Legend: N texts, K types, A attributes.
"""

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.functional.clustering import normalized_mutual_info_score

Pairs = list[tuple[int, int]]  # type, attribute


def as_numbers(sequences: Tensor) -> Tensor:
    """Each different row of (N, S) as one number, (N,)."""
    return torch.unique(sequences, dim=0, return_inverse=True)[1]


def match_types(
    concepts: Tensor, plans: Tensor, score: Callable[[Tensor, Tensor], Tensor] = normalized_mutual_info_score
) -> tuple[Pairs, list[float]]:
    """Pairs of types and attributes with the largest sum of the score, and the score of each; (N, K) and (N, A)."""
    table = torch.tensor([[float(score(c, a)) for a in plans.unbind(-1)] for c in concepts.unbind(-1)])
    rows, columns = linear_sum_assignment(table, maximize=True)
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    return pairs, [float(table[pair]) for pair in pairs]


def codes_of_attributes(concepts: Tensor, plans: Tensor, pairs: Pairs) -> Tensor:
    """Concepts (N, K) that say each text's attributes (N, A): of a matched attribute the code that its texts have most often.

    Types without an attribute keep their codes.
    """
    codes = concepts.clone()
    for kind, attribute in pairs:
        for value in plans[:, attribute].unique():
            own = plans[:, attribute] == value
            codes[own, kind] = concepts[own, kind].mode().values
    return codes


def hungarian_accuracy(codes: Tensor, values: Tensor) -> float:
    """Share of texts whose code (N,) is the one matched to their value (N,), codes to values one to one."""
    codes, values = as_numbers(codes.unsqueeze(-1)), as_numbers(values.unsqueeze(-1))
    counts = torch.zeros(int(codes.max()) + 1, int(values.max()) + 1)
    counts.index_put_((codes, values), torch.ones(len(codes)), accumulate=True)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(codes))


def swap_locality(plans: Tensor, donors: Tensor, swapped: Tensor, pairs: Pairs) -> float:
    """Share of swaps that gave the matched attribute the donor's value and changed no other, over matched types.

    plans, donors (N, A): of the text and of its donor; swapped (N, K, A): of the text written with the donor's concepts of type
    k. Only swaps that should change an attribute count; nan where there is none.
    """
    right, counted = 0, 0
    for kind, attribute in pairs:
        expected = plans.clone()
        expected[:, attribute] = donors[:, attribute]
        counts = (expected != plans).any(-1)
        right += int(((swapped[:, kind] == expected).all(-1) & counts).sum())
        counted += int(counts.sum())
    return right / counted if counted else float("nan")
