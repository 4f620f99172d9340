"""Next-token log-probabilities of given prefixes: what a drafter proposes from, and what it is verified with.

Legend: B batch, L columns, V vocabulary, W positions of a window, F numbers of all chosen layers together, G drafted tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

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


@runtime_checkable
class StateScores(Protocol):
    """`Scores` of a network that keep chosen hidden states of the tokens that they have read."""

    def keep_states(self, layers: Sequence[int]) -> None:
        """Keep the states after these layers from the next call on; layer 0 is the embedding."""
        ...

    def states_before(self, ids: Tensor, ends: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """States (B, W, F) of the positions ends - W, ..., ends - 1, and which of them have been read, (B, W) bool.

        ids (B, L): the tokens that the states have to be of; a position that was read with another one counts as not read.
        """
        ...


class Draws(Protocol):
    """The random draws of a drafter."""

    def choose(self, p: Tensor) -> Tensor:
        """(B, V) probabilities -> (B,) indices."""
        ...

    def uniform(self, rows: int, count: int, like: Tensor) -> Tensor:
        """U(0, 1), (rows, count) float64 on the device of `like`."""
        ...


class BlockProposal(NamedTuple):
    """tokens (B, G), each drawn from its row of logp (B, G, V): given the tokens, and the noise, before it in the draft."""

    tokens: Tensor
    logp: Tensor


@runtime_checkable
class ProposesBlocks(Protocol):
    """A drafter that proposes all tokens of a draft in one forward pass, from hidden states of the verifiers.

    block_length: the most tokens of a draft. window: positions that it reads. state_layers: {verifier: layers}; their states
    are concatenated in that order.
    """

    block_length: int
    window: int
    state_layers: Mapping[str, tuple[int, ...]]

    def propose(
        self,
        states: Tensor,
        read: Tensor,
        last: Tensor,
        size: int,
        draws: Draws,
        shape: Callable[[Tensor], Tensor],
    ) -> BlockProposal:
        """A draft of `size` tokens after the tokens `last` (B,), whose own states are not known yet.

        states (B, W, F), read (B, W) bool: see `StateScores`. shape: (..., V) -> (..., V), what temperature and restrictions
        make of log-probabilities; the draws are from its result, which is what the proposal holds.
        """
        ...
