r"""Vector quantisation: each point is represented by its nearest code, and codes follow the
mean of their points.

.. math:: k = \arg\min_v \|h - c_v\|^2, \qquad e = h + a\, \mathrm{sg}(c_k - h)

a = 1 is the code with a straight-through gradient, 0 the point itself (van den Oord et al., 1711.00937, and its appendix for
the running means). Residual quantisation represents a point by one code of each of L codebooks, coarse to fine
(SoundStream, 2107.03312; RQ-VAE, 2203.01941):

.. math:: r_1 = h, \qquad r_{l+1} = r_l - c^{(l)}_{k_l}, \qquad k_l = \arg\min_v \|r_l - c^{(l)}_v\|^2, \qquad
          h \approx \sum_l c^{(l)}_{k_l}

Legend: N points, V codes, d coordinates, L codebooks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

TINY = 1e-5


class Codebook(NamedTuple):
    """codes (V, d); counts (V,) and sums (V, d): running means of how many points a code has, and of their sum."""

    codes: Tensor
    counts: Tensor
    sums: Tensor


def squared_distances(points: Tensor, codes: Tensor) -> Tensor:
    """||h - c_v||², (..., d) and (V, d) -> (..., V)."""
    return (points.unsqueeze(-2) - codes).square().sum(-1)


def quantised(points: Tensor, codes: Tensor, share: float = 1.0) -> Tensor:
    """h + a sg(c - h) from each point towards its code by a = share of the distance, with the gradient of the point."""
    return points + share * (codes - points).detach()


@torch.no_grad()
def nearest_codes(points: Tensor, codes: Tensor) -> Tensor:
    """The nearest code of each point, (..., d) and (V, d) -> (...)."""
    return squared_distances(points, codes).argmin(-1)


@torch.no_grad()
def residuals(points: Tensor, codebooks: Sequence[Tensor]) -> list[Tensor]:
    """r_1 to r_{L+1} of points (..., d) and L codebooks (V, d): the points, then what each codebook leaves of them."""
    left = [points]
    for codes in codebooks:
        left.append(left[-1] - codes[nearest_codes(left[-1], codes)])
    return left


@torch.no_grad()
def code_spacing(codes: Tensor) -> Tensor:
    """The squared distance of a code (V, d) to the nearest other one, on average, ()."""
    apart = torch.cdist(codes, codes, compute_mode="donot_use_mm_for_euclid_dist")
    return apart.fill_diagonal_(torch.inf).amin(-1).square().mean()


def code_logits(points: Tensor, codes: Tensor) -> Tensor:
    """-||h - c_v||² in units in which a code's nearest neighbours lie 4 below it on average, (..., V): sharp, yet smooth."""
    return -4 * squared_distances(points, codes) / code_spacing(codes).clamp(min=TINY)


def assignment_sums(points: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """How many points each code is nearest to, (V,), and their sum, (V, d); sums of two halves add up to the whole's."""
    own = torch.nn.functional.one_hot(nearest_codes(points, codes), len(codes)).to(points.dtype)
    return own.sum(0), own.T @ points


def ema_update(book: Codebook, count: Tensor, total: Tensor, decay: float) -> Codebook:
    """The codebook after points with these `assignment_sums`: c_v = sums / counts, counts smoothed a little towards even."""
    counts = decay * book.counts + (1 - decay) * count
    sums = decay * book.sums + (1 - decay) * total
    whole = counts.sum()
    smooth = (counts + TINY) / (whole + len(counts) * TINY) * whole
    return Codebook(sums / smooth.clamp(min=TINY).unsqueeze(-1), counts, sums)


def reset_dead(book: Codebook, points: Tensor, fewest: float, generator: Generator) -> tuple[Codebook, int]:
    """Codes with fewer than `fewest` points are moved to a random point; and how many were."""
    dead = book.counts < fewest
    drawn = points[torch.randint(len(points), (len(dead),), generator=generator, device=points.device)]
    moved = dead.unsqueeze(-1)
    counts = torch.where(dead, torch.full_like(book.counts, max(fewest, 1.0)), book.counts)
    sums = torch.where(moved, drawn * counts.unsqueeze(-1), book.sums)
    return Codebook(torch.where(moved, drawn, book.codes), counts, sums), int(dead.sum())


def k_means(points: Tensor, codes: int, generator: Generator, rounds: int = 10) -> Tensor:
    """`codes` centres (V, d) of points (N, d): k-means++ seeds (Arthur and Vassilvitskii, 2007), then Lloyd's rounds."""
    first = torch.randint(len(points), (1,), generator=generator, device=points.device)
    centres = points[first]
    while len(centres) < codes:
        far = squared_distances(points, centres).amin(-1) + TINY
        centres = torch.cat([centres, points[torch.multinomial(far, 1, generator=generator)]])
    for _ in range(rounds):
        count, total = assignment_sums(points, centres)
        centres = torch.where(count.unsqueeze(-1) > 0, total / count.clamp(min=1).unsqueeze(-1), centres)
    return centres
