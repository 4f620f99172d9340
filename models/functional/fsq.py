r"""Finite scalar quantisation: every coordinate is bounded and rounded to one of a few levels.

.. math:: y_i = \frac{L_i}{L_i - 1} \tanh z_i, \qquad c_i = \text{the nearest of } L_i \text{ equally spaced levels in } [-1, 1]

Mentzer et al. (2309.15505), with levels that lie alike on both sides of 0 for odd and even L. The levels share out tanh's
range evenly, and nothing can die: the lattice is fixed.
Legend: d coordinates, V = prod L_i codes.
"""

import torch
from torch import Tensor

from models.functional.errors import UsageError

MOST_LEVELS = 8
COORDINATES = 3  # where codes are few enough for fewer: on a line a point reaches a far code past all between


def fsq_levels(codes: int, option: str) -> list[int]:
    """Levels whose product is `codes`, at most 8 each: 4096 is [8, 8, 8, 8], 64 is [4, 4, 4], 8 is [2, 2, 2].

    As few coordinates as possible, but three where the number allows it. Errors: UsageError that names the option, for a
    number with a prime factor above 8.
    """
    shares = [found for most in range(MOST_LEVELS, 1, -1) if (found := _shared_out(codes, most))]
    if not shares:
        near = 2 ** max(1, codes.bit_length() - 1)
        raise UsageError(f"{option}={codes} cannot be shared out among levels of 2 to 8; type {option}={near}")
    return next((found for found in shares if len(found) >= COORDINATES), max(shares, key=len))


def _shared_out(codes: int, most: int) -> list[int] | None:
    """The largest levels of at most `most` first; None where a factor is larger."""
    levels = []
    while codes > 1:
        level = next((n for n in range(most, 1, -1) if codes % n == 0), None)
        if level is None:
            return None
        levels.append(level)
        codes //= level
    return levels


def fsq_bound(latent: Tensor, levels: Tensor) -> Tensor:
    """y, (..., d): within [-L/(L-1), L/(L-1)], so that each level is the nearest over an equal share of tanh."""
    return latent.tanh() * (levels / (levels - 1))


def fsq_lattice(levels: list[int]) -> Tensor:
    """All codes as points of [-1, 1]^d, (V, d), the last coordinate running fastest."""
    return torch.cartesian_prod(*(torch.linspace(-1, 1, n) for n in levels)).view(-1, len(levels))
