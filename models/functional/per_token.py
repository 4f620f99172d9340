r"""Means per token over texts of different lengths, with an interval that knows that tokens of a text belong together.

.. math:: \bar d = \frac{\sum_i d_i}{\sum_i n_i} \qquad
          \mathrm{Var}(\bar d) \approx \frac{N}{N - 1} \frac{\sum_i (d_i - \bar d n_i)^2}{(\sum_i n_i)^2}

the ratio estimator of cluster sampling (Cochran, Sampling Techniques, 6.3).
Legend: N texts, R tokens of a text.
"""

from typing import NamedTuple

from torch import Tensor

NORMAL_95 = 1.959963984540054


class PerToken(NamedTuple):
    """A mean per token and half the width of its 95 % interval over texts, None for fewer than two texts."""

    mean: float
    half: float | None


def per_token(values: Tensor, counts: Tensor) -> PerToken | None:
    """Of values (N, R) at the tokens that count (N, R) bool; None where none does."""
    return of_totals((values * counts).double().sum(-1), counts.double().sum(-1))


def of_totals(totals: Tensor, tokens: Tensor) -> PerToken | None:
    """Of each text's total (N,) and how many tokens it has, (N,), float64 both; None where there are no tokens."""
    if not tokens.sum() > 0:
        return None
    mean = totals.sum() / tokens.sum()
    used = int((tokens > 0).sum())
    if used < 2:
        return PerToken(mean.item(), None)
    spread = (totals - mean * tokens).square().sum() * used / (used - 1)
    return PerToken(mean.item(), NORMAL_95 * (spread.sqrt() / tokens.sum()).item())


def by_position(values: Tensor, counts: Tensor, width: int) -> dict[int, PerToken]:
    """The same for each `width` positions that hold a token that counts, by the first of them."""
    found = {
        start: per_token(values[:, start : start + width], counts[:, start : start + width])
        for start in range(0, values.shape[1], width)
    }
    return {start: value for start, value in found.items() if value is not None}
