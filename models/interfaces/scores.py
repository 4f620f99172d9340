"""Next-token log-probabilities of given prefixes: what a drafter proposes from, and what it is verified with.

Legend: B batch, L columns, V vocabulary.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Scores(Protocol):
    """A source of next-token log-probabilities: a causal LM, with a key-value cache or without one, or an n-gram table."""

    def __call__(self, ids: Tensor, lengths: Tensor, count: int) -> Tensor:
        """log p (B, count, V) in nats of the tokens at positions lengths, lengths + 1, ..., lengths + count - 1.

        ids (B, L) int64: tokens, right-padded. lengths (B,) int64, at least 1: how many tokens of a row are settled; the
        columns up to lengths + count - 1 hold the tokens that the later positions are conditioned on. Rows are normalised;
        -inf is a token that cannot follow.
        """
        ...


# A drafter proposes tokens from its scores; the distributions that they are drawn from also decide what is accepted.
Drafter = Scores


@runtime_checkable
class CachedRows(Protocol):
    """`Scores` that keep a state for each row of a batch, which has to follow when rows leave the batch."""

    def keep_rows(self, stay: Tensor) -> None:
        """The next call has the rows of the last one at which stay (B,) bool is True, in their order."""
        ...
