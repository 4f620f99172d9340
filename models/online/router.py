"""Routers decide which positions commit (`module.growth`), for a whole text or for one position at a time.

A router turns shallow hidden states into scores. A position with a score above 0 commits; other positions are NULLs.
All routers share: scores that are centred at the wanted rate, an offset that holds the realised rate, noise, and a longest
run of NULLs.
Legend: B batch (n rows of a step), T positions, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import pad

from models.backbones.added_layers import AddedLinear
from models.functional import commits
from models.functional.bits_per_byte import token_nll
from models.functional.commit_rate import correction, null_bias, rate_threshold
from models.functional.errors import UsageError
from models.functional.gumbel import gumbel_noise
from models.functional.next_token import CausalText, shifted_targets
from models.functional.precision import at_least_float32
from models.online.codes import ConceptCodes
from models.online.options import Growth, OnlineModelOptions

ReadOut = Callable[[Tensor], Tensor]
LEAST_SCORE = 1e-6  # of a position that commits because nothing was drafted for it
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


class NullRouter(Router):
    """NULL is one more class beside the codes: a position commits where all codes together are likelier than NULL."""

    def __init__(self, width: int, most_nulls: int, codes: ConceptCodes, **like) -> None:
        super().__init__(width, most_nulls, **like)
        self.null = AddedLinear(width, 1, **like)
        nn.init.zeros_(self.null.weight)
        # the codes' log-sum-exp at random states, so that a fresh router's scores lie around 0
        states = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(next(codes.parameters()))
        with torch.no_grad():
            self.null.bias.fill_((codes.log_mass(states).float() - null_bias(2.0, codes.codes)).mean())

    def scores(self, hidden: Tensor, codes: ConceptCodes) -> Tensor:
        # first NULL or not, then which code: the most probable class of all would nearly always be NULL
        log_odds = codes.log_mass(hidden) - null_bias(2.0, codes.codes)
        return log_odds - self.null(codes.normed(hidden)).squeeze(-1)

    def multiplied(self, codes: ConceptCodes, output: int) -> int:
        return super().multiplied(codes, output) + codes.weighed


class ScoreRouter(Router):
    """The score of a position is the output of a small MLP."""

    def __init__(self, width: int, most_nulls: int, **like) -> None:
        super().__init__(width, most_nulls, **like)
        self.score = nn.Sequential(
            AddedLinear(width, width // 4, **like), nn.SiLU(), AddedLinear(width // 4, 1, **like)
        )
        nn.init.zeros_(self.score[-1].weight)
        nn.init.zeros_(self.score[-1].bias)

    def scores(self, hidden: Tensor, codes: ConceptCodes) -> Tensor:
        return self.score(codes.normed(hidden)).squeeze(-1)


class AutoregressiveRouter(ScoreRouter):
    """Each decision depends on those before it: a learned bias by the number of NULLs since the last commit is added."""

    def __init__(self, width: int, most_nulls: int, **like) -> None:
        super().__init__(width, most_nulls, **like)
        self.by_distance = nn.Parameter(torch.zeros(most_nulls + 1, dtype=torch.float32, device=like.get("device")))

    def decide(
        self, scores: Tensor, at: TextPositions, state: RouterState, compression: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            nulls = commits.renewal_nulls(scores, self.by_distance, at.valid, self.most_nulls, state.since, at.begins)
        scores = scores + self.by_distance[nulls.clamp(max=self.most_nulls)]
        return scores > 0, scores.sigmoid(), state.total


class AccumulateRouter(ScoreRouter):
    """Continuous integrate-and-fire: sigmoid(score) is summed, and a position commits where the sum passes an integer."""

    def decide(
        self, scores: Tensor, at: TextPositions, state: RouterState, compression: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        increments = scores.sigmoid()
        natural, total = commits.accumulated_commits((increments * at.valid).detach(), state.total, at.begins)
        return natural, increments, total

    def spread(self, moments: Tensor) -> Tensor:
        return moments.new_ones(())  # the rate is a function of the offset itself, there is no threshold


class FixedRouter(Router):
    """Evenly spaced commits, M in every N = compression M positions; nothing is learned."""

    learned = False
    pattern = staticmethod(commits.even_commits)

    def scores(self, hidden: Tensor, codes: ConceptCodes) -> Tensor:
        return hidden.new_zeros(hidden.shape[:2])

    def decide(
        self, scores: Tensor, at: TextPositions, state: RouterState, compression: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        natural = self.pattern(at.position, compression) & at.valid
        return natural, natural.to(scores.dtype), state.total

    def correct_offset(self, realised: Tensor, compression: float, moments: Tensor) -> None:
        """The pattern's rate is exact already."""


class RandomRouter(FixedRouter):
    """A control: as many commits as `FixedRouter`, at pseudo-random positions that do not depend on the text."""

    pattern = staticmethod(commits.random_commits)


class SurpriseRouter(Router):
    """A position commits where tokens are hard to predict from states, which get no gradient from that.

    The size of these surprises is not known before texts are read. So nearly every position commits until `correct_offset` is
    called once; it then sets the threshold by the surprises of that step.
    """

    learned = False
    growth: Growth

    def __init__(self, width: int, most_nulls: int, read_out: ReadOut | None = None, **like) -> None:
        super().__init__(width, most_nulls, **like)
        if read_out is None:
            raise UsageError(
                f"module.growth={self.growth} needs tokens to predict, which an inner level has none of; type module.levels=1 "
                "or another module.growth"
            )
        self._read_out = [read_out]  # in a list, so that the backbone's head is no part of the router's weights

    def draft_nll(self, hidden: Tensor, text: CausalText, generator: Generator | None) -> Tensor:
        """-log p of the predictions whose surprise is read, nats a token; the term `draft`. hidden (B, T, D)."""
        raise NotImplementedError

    @torch.no_grad()
    def correct_offset(self, realised: Tensor, compression: float, moments: Tensor) -> None:
        before = self.offset.clone()
        super().correct_offset(realised, compression, moments)
        if compression > 1:
            first = before + rate_threshold(moments[1] / moments[0], self.spread(moments), compression)
            self.offset.copy_(torch.where(before == 0, first, self.offset))

    def multiplied(self, codes: ConceptCodes, output: int) -> int:
        return super().multiplied(codes, output) + output


class EntropyRouter(SurpriseRouter):
    """A position commits where the entropy of a next-token distribution, predicted from its state, is high."""

    growth = "entropy"

    def __init__(self, width: int, most_nulls: int, read_out: ReadOut | None = None, **like) -> None:
        super().__init__(width, most_nulls, read_out, **like)
        self.adapt = AddedLinear(width, width, bias=False, **like)
        nn.init.zeros_(self.adapt.weight)

    def draft(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of the next token from states."""
        hidden = hidden.detach()
        return self._read_out[0](hidden + self.adapt(hidden))

    def scores(self, hidden: Tensor, codes: ConceptCodes) -> Tensor:
        with torch.no_grad():
            log_p = at_least_float32(self.draft(hidden)).log_softmax(-1)
            return -(log_p.exp() * log_p).sum(-1)

    def draft_nll(self, hidden: Tensor, text: CausalText, generator: Generator | None) -> Tensor:
        return token_nll(self.draft(hidden[text.weights]), text.targets[text.weights]).mean()


class DraftRouter(SurpriseRouter):
    """At each commit the next K tokens are drafted from its state; a position commits where the draft did not expect its token.

    A segment goes on as the draft said, and ends with the first token whose surprise -log p is high. The first position of a
    text commits, as nothing was drafted for it, and so does the position behind the K-th token of a draft.
    """

    growth = "draft"

    def __init__(
        self, width: int, most_nulls: int, read_out: ReadOut | None = None, draft_tokens: int = 8, **like
    ) -> None:
        super().__init__(width, most_nulls, read_out, **like)
        self.length = min(draft_tokens, most_nulls)
        self.ahead = nn.Embedding(self.length, width, **like)
        self.mix, self.adapt = (AddedLinear(width, width, bias=False, **like) for _ in range(2))
        nn.init.zeros_(self.adapt.weight)

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> RouterState:
        anchor = torch.zeros(batch, self.mix.in_features, device=device, dtype=dtype)
        return super().start(batch, device, dtype)._replace(anchor=anchor)

    def draft(self, hidden: Tensor, ahead: Tensor) -> Tensor:
        """Logits (..., V) of the token that is `ahead` (...), 1 to K, positions after states (..., D)."""
        hidden = hidden.detach()
        scale = hidden.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt().to(hidden.dtype)
        mixed = nn.functional.silu(self.mix(hidden * scale) + self.ahead(ahead - 1))
        return self._read_out[0](hidden + self.adapt(mixed))

    @torch.no_grad()
    def centred_scores(
        self, hidden: Tensor, codes: ConceptCodes, at: TextPositions, state: RouterState, compression: float
    ) -> Tensor:
        assert at.tokens is not None
        threshold = null_bias(compression) + self.offset
        count = at.valid.long().cumsum(1)
        # 1. surprise of every token in a draft made 1 .. K positions before it, (B, T, K)
        columns = []
        for k in range(1, self.length + 1):
            before = pad(hidden, (0, 0, k, 0))[:, : hidden.shape[1]]
            columns.append(self._surprise(before, torch.full_like(at.tokens, k), at.tokens))
        surprises = torch.stack(columns, -1)
        # 2. and in the draft of the last commit before these positions
        ahead = (state.since.unsqueeze(1) + count).clamp(1, self.length)
        earlier = self._surprise(state.anchor.unsqueeze(1).expand_as(hidden), ahead, at.tokens)
        # 3. those of the drafts that are in force, position by position
        begins = at.position == 0
        nulls, fresh = commits.draft_nulls(surprises, earlier, threshold, at.valid, begins, state.since)
        used = surprises.gather(-1, nulls.clamp(max=self.length - 1).unsqueeze(-1)).squeeze(-1)
        scores = torch.where(fresh, earlier, used) - threshold
        return torch.where(begins | (nulls >= self.length), LEAST_SCORE, scores)

    def _surprise(self, hidden: Tensor, ahead: Tensor, tokens: Tensor) -> Tensor:
        """-log p (B, T) of tokens (B, T) in drafts from states (B, T, D)."""
        return token_nll(at_least_float32(self.draft(hidden, ahead)), tokens)

    def remember(self, state: RouterState, hidden: Tensor, commit: Tensor) -> RouterState:
        position = torch.arange(commit.shape[1], device=commit.device)
        last = torch.where(commit, position, 0).amax(1)
        anchor = hidden.detach()[torch.arange(len(hidden), device=hidden.device), last]
        return state._replace(anchor=torch.where(commit.any(1, keepdim=True), anchor, state.anchor))

    def draft_nll(self, hidden: Tensor, text: CausalText, generator: Generator | None) -> Tensor:
        """Of each position one of the K tokens after it, drawn uniformly: an unbiased estimate of the mean over all."""
        drawn = torch.randint(self.length, text.ids.shape, generator=generator, device=text.ids.device)
        parts = [shifted_targets(text, k + 1) for k in range(self.length)]
        targets, weights = (
            torch.stack(part, -1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1) for part in zip(*parts, strict=True)
        )
        nll = token_nll(self.draft(hidden[weights], drawn[weights] + 1), targets[weights])
        return nll.sum() / weights.sum().clamp(min=1)

    def multiplied(self, codes: ConceptCodes, output: int) -> int:
        return self.mix.weight.numel() + self.adapt.weight.numel() + output


GROWTH: dict[Growth, type[Router]] = {
    "autoregressive": AutoregressiveRouter,
    "null": NullRouter,
    "accumulate": AccumulateRouter,
    "fixed": FixedRouter,
    "random": RandomRouter,
    "entropy": EntropyRouter,
    "draft": DraftRouter,
}


def build_router(
    options: OnlineModelOptions, width: int, codes: ConceptCodes, read_out: ReadOut | None = None, **like
) -> Router:
    """The router of these options.

    codes: for `null`. read_out: logits of the backbone's hidden states; None on inner levels.
    """
    more: dict[str, dict[str, Any]] = {
        "null": {"codes": codes},
        "entropy": {"read_out": read_out},
        "draft": {"read_out": read_out, "draft_tokens": options.draft_tokens},
    }
    router = GROWTH[options.growth](width, options.most_nulls, **more.get(options.growth, {}), **like)
    router.commit_first = options.commit_first
    return router
