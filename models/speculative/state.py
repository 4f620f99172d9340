"""A batch while it is sampled from q*: its committed tokens, the rows that have ended, and what each model has done.

Legend: B rows that go on, R rows of the request, L columns of the buffer, N new tokens, G drafted tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.functional.errors import require_at_least
from models.functional.next_token import are_ends
from models.functional.qstar import no_common_token, residual
from models.interfaces.scores import BlockProposal
from models.speculative.distribution import MixtureDist, NextTokenDist
from models.speculative.draft_totals import DraftTotals
from models.speculative.random_source import RandomSource

# (ids (B, L), lengths (B,), count) -> log-probabilities (B, count, V) of the tokens at positions lengths, lengths + 1, ...
Scores = Callable[[Tensor, Tensor, int], Tensor]
# (ids (1, n), log q (1, V)) -> scores (1, V), as a Hugging Face logits processor
Processor = Callable[[Tensor, Tensor], Tensor]

# what is recorded of every committed token, by its name in `NextTokenDist`
TOKEN_FIGURES = ("alpha", "chernoff", "theta", "target", "log_q")


@dataclass(frozen=True)
class TextRules:
    """What ends a text, and what changes q* on the way.

    max_new_tokens: of every row. eos_ids: tokens that end a row. stop: called with the ids (n,) of a row after each of its
    tokens; True ends the row. processors: act on log q* before top-k and top-p.
    padded_prompts (R, P): the prompts as `stop` and `processors` see them; None shows them without padding.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...] = ()
    stop: Callable[[Tensor], bool] | None = None
    processors: tuple[Processor, ...] = ()
    padded_prompts: Tensor | None = None

    def __post_init__(self) -> None:
        require_at_least(1, max_new_tokens=self.max_new_tokens)


@dataclass
class QStarOutput:
    """tokens (R, N) after the prompts, of which lengths (R,) count; the first end token, or 0, fills the rest.

    alpha, chernoff, logp_theta, logp_t, log_q (R, N): of each token at its position, NaN beyond the end.
    drafts: of each row counted alone. drafted_tokens: in all of them.
    verified, accepted: by model, its proposed tokens that were verified (none after a rejection), and those accepted.
    forwards: by model, its forward passes for the whole batch.
    verified_at, accepted_at: by position in a draft, the tokens that were verified there, and those accepted.
    draft_starts (D, 2), draft_lengths (D,): row and first position in `tokens` of each draft, and its tokens.
    undrafted: rounds, of each row counted alone, in which q* was sampled without a draft.
    """

    tokens: Tensor
    lengths: Tensor
    alpha: Tensor
    chernoff: Tensor
    logp_theta: Tensor
    logp_t: Tensor
    log_q: Tensor
    drafts: int
    drafted_tokens: int
    verified: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)
    verified_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    draft_starts: Tensor | None = None
    draft_lengths: Tensor | None = None
    undrafted: int = 0

    @property
    def acceptance(self) -> dict[str, float]:
        """The acceptance rate β of each model's proposals."""
        return {name: self.accepted[name] / count for name, count in self.verified.items() if count}

    @property
    def totals(self) -> DraftTotals:
        """What the drafts were worth."""
        tokens, at = int(self.lengths.sum()), (tuple(self.verified_at), tuple(self.accepted_at))
        return DraftTotals(tokens, self.drafts, self.undrafted, *at)


class QStarRun:
    """The state of a batch, and the steps that change it.

    models: {"theta", "target", and "assistant" where a third one drafts}. draft_columns: how far drafts may reach beyond the
    last token of a text. shared_noise: see `DraftOptions`; it takes the memory of R N V numbers of 8 bytes.
    rows (B,): the rows of the request that go on; `drop_ended` removes the others. What is returned of
    all R rows is kept apart: new_tokens, new_lengths, figures.
    """

    def __init__(
        self,
        models: dict[str, Scores],
        input_ids: Tensor,
        lengths: Tensor,
        *,
        rules: TextRules,
        draft_columns: int,
        mixture: MixtureDist,
        rng: RandomSource,
        shared_noise: bool = False,
    ) -> None:
        self.models, self.rules, self.mixture, self.rng = models, rules, mixture, rng
        batch, device, longest = len(input_ids), input_ids.device, rules.max_new_tokens
        self.ids = torch.cat([input_ids, input_ids.new_zeros(batch, longest + draft_columns)], -1)
        self.rows, self.lengths, self.start = torch.arange(batch, device=device), lengths.clone(), lengths.clone()
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.new_tokens, self.new_lengths = input_ids.new_zeros(batch, longest), torch.zeros_like(lengths)
        self.figures = {
            name: torch.full((batch, longest), torch.nan, dtype=torch.float64, device=device) for name in TOKEN_FIGURES
        }
        # positions that every model can read; a request that fits is never drafted beyond them
        self.context = min(getattr(model, "context", None) or self.ids.shape[1] for model in models.values())
        self.drafts, self.drafted_tokens, self.undrafted = 0, 0, 0
        self.verified_at, self.accepted_at = [0] * draft_columns, [0] * draft_columns
        self.draft_starts: list[Tensor] = []
        self.draft_lengths: list[Tensor] = []
        self.shared_noise, self._noise = shared_noise, torch.empty(0)
        self.verified, self.accepted, self.forwards = (dict.fromkeys(models, 0) for _ in range(3))

    # -- rows ---------------------------------------------------------------------------------------------------------

    @property
    def generated(self) -> Tensor:
        """New tokens of each row, (B,)."""
        return self.lengths - self.start

    @property
    def remaining(self) -> Tensor:
        """Tokens that each row may still get, (B,)."""
        return self.rules.max_new_tokens - self.generated

    @property
    def active(self) -> Tensor:
        """Rows that go on, (B,) bool."""
        return ~self.ended & (self.remaining > 0)

    def drop_ended(self) -> Tensor:
        """Remove the rows that have ended from the batch and from the caches. Returns which stay, (B,) bool."""
        stay = self.active
        self.rows, self.ids, self.lengths, self.start, self.ended = (
            part[stay] for part in (self.rows, self.ids, self.lengths, self.start, self.ended)
        )
        for model in self.models.values():
            if hasattr(model, "keep_rows"):
                model.keep_rows(stay)
        return stay

    # -- models -------------------------------------------------------------------------------------------------------

    def score(self, name: str, offset: int | Tensor, count: int) -> Tensor:
        """One forward pass: tempered log-probabilities (B, count, V) from `offset` positions beyond the committed tokens on.

        offset: a number, or one of each row (B,). Rows that have ended get arbitrary values.
        """
        self.forwards[name] += 1
        active, wanted = self.active, self.lengths + offset
        # ended rows must not widen the forward pass
        within = torch.where(active, wanted, wanted[active].min())
        return self.mixture.tempered(self.models[name](self.ids, within, count))

    def draw(self, p: Tensor, offset: int | Tensor) -> Tensor:
        """Tokens (B,) from p (B, V), `offset` positions beyond the committed ones; with the noise of a position if shared."""
        if not self.shared_noise:
            return self.rng.choose(p)
        if not len(self._noise):  # all at once, so that it does not depend on what is drafted
            request, longest = self.new_tokens.shape
            uniform = self.rng.uniform(request * longest, p.shape[-1], p).clamp(min=1e-300)
            self._noise = -torch.log(-torch.log(uniform)).view(request, longest, -1)
        position = (self.generated + offset).clamp(max=self._noise.shape[1] - 1)
        return (p.double().log() + self._noise[self.rows, position]).argmax(-1)

    def propose(self, name: str, size: int) -> BlockProposal:
        """One forward pass of a drafter of blocks: `size` tokens behind the committed ones, for every row."""
        drafter: Any = self.models[name]
        self.forwards[name] += 1
        # the last token of a row has been committed, but not been read
        ends = self.lengths - 1
        found = [self._states(verifier, ends, drafter.window) for verifier in drafter.state_layers]
        states = torch.cat([part for part, _ in found], -1)
        read = torch.stack([part for _, part in found]).all(0)
        last = self.ids.gather(1, ends.unsqueeze(-1)).squeeze(-1)
        draws = _PositionDraws(self) if self.shared_noise else self.rng
        return drafter.propose(states, read, last, size, draws, self.mixture.proposal)

    def _states(self, verifier: str, ends: Tensor, window: int) -> tuple[Tensor, Tensor]:
        model: Any = self.models[verifier]
        return model.states_before(self.ids, ends, window)

    def write(self, tokens: Tensor, offset: int | Tensor) -> None:
        """Put drafted tokens (B,) at `offset` positions beyond the committed tokens."""
        self.ids.scatter_(1, (self.lengths + offset).unsqueeze(-1), tokens.unsqueeze(-1))

    def next_token_dist(self, theta: Tensor, target: Tensor) -> NextTokenDist:
        """q* at the next positions, from both models' (B, G, V).

        Behind a drafted token that q* never has, q* may not exist. Such a position has weight NaN and is never committed.
        """
        undefined = ~(theta.isfinite() & target.isfinite()).any(-1)
        if not bool(undefined.any()):
            return self._mix(theta, target)
        uniform = torch.zeros_like(theta).log_softmax(-1)
        dist = self._mix(*(torch.where(undefined.unsqueeze(-1), uniform, part) for part in (theta, target)))
        return dist._replace(alpha=dist.alpha.masked_fill(undefined, torch.nan), theta=theta, target=target)

    def _mix(self, theta: Tensor, target: Tensor) -> NextTokenDist:
        if not self.rules.processors:
            return self.mixture(theta, target)
        whole = MixtureDist(self.mixture.theta_weight)(theta, target)
        log_q = whole.log_q.clone()
        for row, length in enumerate(self.lengths.tolist()):
            for k in range(log_q.shape[1]):
                for process in self.rules.processors:
                    log_q[row, k] = process(self._text(row, length + k).unsqueeze(0), log_q[row : row + 1, k])[0]
        return whole._replace(log_q=self.mixture.truncated(log_q.log_softmax(-1)))

    def _text(self, row: int, length: int) -> Tensor:
        """The ids (n,) of a row as `stop` and `processors` see them; the models read the first `length`."""
        if self.rules.padded_prompts is None:
            return self.ids[row, :length]
        return torch.cat([self.rules.padded_prompts[self.rows[row]], self.ids[row, int(self.start[row]) : length]])

    # -- tokens -------------------------------------------------------------------------------------------------------

    def commit(self, rows: Tensor, tokens: Tensor, dist: NextTokenDist) -> None:
        """Append tokens (B,) to those of the rows (B,) bool that go on. dist: q* at that position, (B, V).

        Raises UsageError where q* does not exist.
        """
        rows = rows & self.active
        row = rows.nonzero().squeeze(-1)
        if bool(dist.alpha[row].isnan().any()):
            raise no_common_token(dist.theta[row], dist.target[row])
        self.ids[row, self.lengths[row]] = tokens[row]
        request, position = self.rows[row], self.generated[row]
        self.new_tokens[request, position] = tokens[row]
        self.new_lengths[request] += 1
        for name in TOKEN_FIGURES:
            value = getattr(dist, name)
            figure = value[row] if value.ndim == 1 else value[row, tokens[row]]
            self.figures[name][request, position] = figure.double()
        self.lengths = self.lengths + rows.long()
        self.ended = self.ended | (rows & are_ends(tokens, self.rules.eos_ids))
        if self.rules.stop is not None:
            for k in row.tolist():
                self.ended[k] |= bool(self.rules.stop(self._text(k, int(self.lengths[k]))))

    def sample(self, rows: Tensor, dist: NextTokenDist) -> None:
        """Commit a token of q* itself to each of the rows (B,) bool."""
        self.commit(rows, self.draw(dist.log_q.exp(), 0), dist)

    def verify(self, rows: Tensor, tokens: Tensor, dist: NextTokenDist, proposer: str, proposal: Tensor) -> Tensor:
        """Accept tokens (B,) of the rows (B,) bool, drawn from log-probabilities proposal (B, V), or replace them; commit.

        Accept iff log u < log q(x) - log p(x); a replacement is drawn from norm((q - p)+). Returns the accepted, (B,) bool.
        """
        log_p = proposal.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        log_q = dist.log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        accepted = self.rng.accept(log_q - log_p) & rows
        rejected = rows & ~accepted
        self.count(proposer, int(rows.sum()), int(accepted.sum()))
        if bool(rejected.any()):
            tokens = torch.where(rejected, self.rng.choose(residual(dist.log_q, proposal)), tokens)
        self.commit(rows, tokens, dist)
        return accepted

    def count(self, proposer: str, verified: int, accepted: int) -> None:
        self.verified[proposer] += verified
        self.accepted[proposer] += accepted

    def count_at(self, position: int, verified: int, accepted: int) -> None:
        """position: in a draft."""
        self.verified_at[position] += verified
        self.accepted_at[position] += accepted

    def count_draft(self, lengths: Tensor) -> None:
        """A draft of lengths (B,) is about to be verified."""
        active = self.active
        self.drafts += int(active.sum())
        self.drafted_tokens += int(lengths[active].sum())
        self.draft_starts.append(torch.stack([self.rows, self.generated], -1)[active])
        self.draft_lengths.append(lengths[active])

    def output(self) -> QStarOutput:
        beyond = torch.arange(self.rules.max_new_tokens, device=self.ids.device) >= self.new_lengths.unsqueeze(-1)
        tokens = self.new_tokens.masked_fill(beyond, next(iter(self.rules.eos_ids), 0))
        f = self.figures
        starts, sizes = (torch.cat(found) if found else None for found in (self.draft_starts, self.draft_lengths))
        return QStarOutput(
            tokens, self.new_lengths, f["alpha"], f["chernoff"], f["theta"], f["target"], f["log_q"],
            self.drafts, self.drafted_tokens, self.verified, self.accepted, self.forwards,
            self.verified_at, self.accepted_at, starts, sizes, self.undrafted,
        )  # fmt: skip


class _PositionDraws:
    """The draws of a draft, from its first position on, with the noise of each position."""

    def __init__(self, run: QStarRun) -> None:
        self.run, self.drawn, self.uniform = run, 0, run.rng.uniform

    def choose(self, p: Tensor) -> Tensor:
        self.drawn += 1
        return self.run.draw(p, self.drawn - 1)
