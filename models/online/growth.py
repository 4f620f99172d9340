"""The rules of `module.growth`: each is a router that scores positions in its own way.

Legend: B batch, T positions, K tokens of a draft, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import pad

from models.backbones.added_layers import AddedLinear
from models.functional import commits
from models.functional.bits_per_byte import token_nll
from models.functional.commit_rate import null_bias, rate_threshold
from models.functional.errors import UsageError
from models.functional.next_token import CausalText, shifted_targets
from models.functional.precision import at_least_float32
from models.online.codes import ConceptCodes
from models.online.options import Growth, OnlineModelOptions
from models.online.router import Router, RouterState, TextPositions

ReadOut = Callable[[Tensor], Tensor]
LEAST_SCORE = 1e-6  # of a position that commits because nothing was drafted for it


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
    text commits, as nothing was drafted for it, and so does the position behind the K-th token of a draft. Both have a least
    score, because no draft has a surprise for them. `commit_first` could not say that: it is an option, and it leaves the score
    itself, which rate control counts, as it is.
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
