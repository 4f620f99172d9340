"""Routers decide which positions commit (`module.growth`), for a whole text or for one position at a time.

A router turns shallow hidden states into scores. A position with a score above 0 commits; other positions are NULLs.
All routers share: scores that are centred at the wanted rate, an offset that holds the realised rate, noise, and a longest
run of NULLs.
Legend: B batch (n rows of a step), T positions, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from models.functional import commits
from models.functional.commit_rate import correction, null_bias
from models.functional.gumbel import gumbel_noise
from models.functional.precision import at_least_float32
from models.online.codes import ConceptCodes

LEAST_SPREAD = 0.05  # equal scores have a spread of 0, and the offset would never move
SURE = 40.0  # score of a position that commits in any case: its sigmoid is 1, also in float64


class RouterState(NamedTuple):
    """The rows so far, (B,) each. since: NULLs since the last commit; total: the sum of `accumulate`; position: the next.

    anchor (B, D): of `draft`, the state of the last commit; (B, 0) of others.
    """

    since: Tensor
    total: Tensor
    position: Tensor
    anchor: Tensor

    def rows(self, rows: Tensor) -> "RouterState":
        return RouterState(*(part[rows] for part in self))

    def put(self, rows: Tensor, new: "RouterState") -> None:
        for held, part in zip(self, new, strict=True):
            held[rows] = part


class TextPositions(NamedTuple):
    """valid (B, T) bool is False on padding; position (B, T) counts from the beginning of each document.

    begins (B, T) bool: first positions of documents; None where a row is one text. tokens (B, T); None on an inner level.
    """

    valid: Tensor
    position: Tensor
    begins: Tensor | None
    tokens: Tensor | None = None


class Routing(NamedTuple):
    """commit (B, T) bool; probability (B, T) of a commit, with its gradient; valid (B, T) bool.

    moments (3,): number, sum and sum of squares of the scores of valid positions; compression: the wanted one.
    """

    commit: Tensor
    probability: Tensor
    valid: Tensor
    moments: Tensor
    compression: float

    @property
    def realised(self) -> Tensor:
        """Share of valid positions that commit."""
        return self.commit.sum() / self.valid.sum().clamp(min=1)


class Router(nn.Module):
    """most_nulls: longest run of NULLs. offset: subtracted from every score, set by rate control and by no gradient.

    commit_first: the first position of every text commits, whatever its score.
    """

    learned = True  # whether the scores have trained weights; then they get noise and the ratio loss
    commit_first = False

    def __init__(self, width: int, most_nulls: int, **like) -> None:
        super().__init__()
        self.most_nulls = most_nulls
        self.register_buffer("offset", torch.zeros((), dtype=torch.float32, device=like.get("device")))

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> RouterState:
        """State before the first position. dtype: of hidden states."""
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return RouterState(zeros, zeros.double(), zeros.clone(), torch.zeros(batch, 0, device=device, dtype=dtype))

    def forward(
        self,
        hidden: Tensor,
        valid: Tensor,
        state: RouterState,
        codes: ConceptCodes,
        documents: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        compression: float,
        noise: float = 0.0,
        generator: Generator | None = None,
    ) -> tuple[Routing, RouterState]:
        """hidden (B, T, D), valid (B, T) bool -> `Routing`, and the state after these positions.

        documents (B, T): of rows with several documents, each of which starts with a fresh state. tokens (B, T): None where
        positions are no tokens. noise: at 1 commits are
        sampled with their probability, at 0 a position commits where it is above one half.
        """
        position = state.position.unsqueeze(1) + valid.long().cumsum(1) - 1
        after = state._replace(position=state.position + valid.sum(1))
        begins = None
        if documents is not None:
            position = commits.positions_in_documents(position, documents)
            begins = (position == 0) & valid
        if compression == 1:
            one = torch.ones_like(valid, dtype=hidden.dtype)
            return Routing(valid, one, valid, one.new_zeros(3), 1.0), after
        # 1. scores, centred so that a fresh router commits about one position in `compression`
        at = TextPositions(valid, position, begins, tokens)
        scores = self.centred_scores(hidden, codes, at, state, compression)
        if noise and self.learned:
            scores = scores + noise * (gumbel_noise(scores, generator) - gumbel_noise(scores, generator))  # logistic
        # 2. commits, and forced ones: at the beginning of a text, and after `most_nulls` NULLs
        first = (position == 0) & valid & self.commit_first
        natural, probability, total = self.decide(scores.masked_fill(first, SURE), at, state, compression)
        probability = probability.masked_fill(first, 1.0)
        commit = commits.cap_nulls((natural | first) & valid, valid, self.most_nulls, state.since, begins)
        since = commits.nulls_since(commit, valid, state.since)
        real = scores.detach()[valid]
        moments = torch.stack([valid.sum().to(real.dtype), real.sum(), real.square().sum()])
        routing = Routing(commit, probability.to(hidden.dtype), valid, moments, compression)
        return routing, self.remember(after._replace(since=since, total=total), hidden, commit)

    def centred_scores(
        self, hidden: Tensor, codes: ConceptCodes, at: TextPositions, state: RouterState, compression: float
    ) -> Tensor:
        """(B, T): a position with a score above 0 commits."""
        return at_least_float32(self.scores(hidden, codes)) - null_bias(compression) - self.offset

    def remember(self, state: RouterState, hidden: Tensor, commit: Tensor) -> RouterState:
        """The state, with what later decisions read of these hidden states (B, T, D) and commits (B, T)."""
        return state

    def scores(self, hidden: Tensor, codes: ConceptCodes) -> Tensor:
        """(B, T), around 0 for a fresh router."""
        raise NotImplementedError

    def decide(
        self, scores: Tensor, at: TextPositions, state: RouterState, compression: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Natural commits (B, T), their probability (B, T) and the new running sum (B,)."""
        return scores > 0, scores.sigmoid(), state.total

    def spread(self, moments: Tensor) -> Tensor:
        """Standard deviation of the scores, with a lower bound."""
        count, total, squares = moments
        return (squares / count - (total / count).square()).clamp(min=LEAST_SPREAD**2).sqrt()

    def multiplied(self, codes: ConceptCodes, output: int) -> int:
        """Weights in matrix products per position. output: weights of the backbone's output layer."""
        return sum(p.numel() for p in self.parameters() if p.ndim == 2)

    @torch.no_grad()
    def correct_offset(self, realised: Tensor, compression: float, moments: Tensor) -> None:
        """After an optimiser step; realised rate and moments are those of all its micro-batches and ranks."""
        if compression > 1:
            self.offset.copy_(correction(self.offset, realised, compression, self.spread(moments)))
