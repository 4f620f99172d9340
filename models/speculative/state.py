"""A batch that is being decoded from q*: what is settled, what has ended, and what each model has been asked and has proposed.

Legend: B batch, L columns of the buffer, N new tokens, G drafted tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.functional.qstar import no_common_token, residual
from models.speculative.distribution import MixtureDist, NextTokenDist
from models.speculative.random_source import RandomSource

# (ids (B, L), lengths (B,), count) -> log-probabilities (B, count, V) of the tokens at places lengths, lengths + 1, ...
Scores = Callable[[Tensor, Tensor, int], Tensor]
# (ids (1, n), log q (1, V)) -> scores (1, V), as a Hugging Face logits processor
Processor = Callable[[Tensor, Tensor], Tensor]

NOTES = ("alpha", "chernoff", "theta", "target", "log_q")


@dataclass
class QStarOutput:
    """tokens (B, N) after the prompts, of which lengths (B,) are real; beyond them the end token, or 0, is repeated.

    alpha, chernoff, logp_theta, logp_t, log_q (B, N): of each token at its place, NaN beyond the end.
    drafts, drafted: how many drafts were made, each row's counted, and their tokens. examined, kept: each model's proposals
    that were looked at (those after a rejection are not) and that were kept. forwards: evaluations of each model, for the
    whole batch.
    """

    tokens: Tensor
    lengths: Tensor
    alpha: Tensor
    chernoff: Tensor
    logp_theta: Tensor
    logp_t: Tensor
    log_q: Tensor
    drafts: int
    drafted: int
    examined: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)

    @property
    def acceptance(self) -> dict[str, float]:
        """beta of each model's proposals: the share of the examined ones that were kept."""
        return {name: self.kept[name] / count for name, count in self.examined.items() if count}


class QStarRun:
    """The state of a batch, and the steps that change it.

    models: {"theta", "target", and "assistant" where a third one drafts}. eos_ids, stop: what ends a row; stop sees the ids
    (n,) of one row after each of its tokens. processors act on log q* before top-k and top-p. shown (B, P): the prompts as
    processors and stop are to see them, padding and all; None shows what the models read.
    rows (B,): which rows of the request are still here; `drop_ended` lets the others go. said, notes, counts keep them all.
    """

    def __init__(
        self,
        models: dict[str, Scores],
        input_ids: Tensor,
        lengths: Tensor,
        *,
        max_new_tokens: int,
        spare: int,
        mixture: MixtureDist,
        eos_ids: tuple[int, ...],
        stop: Callable[[Tensor], bool] | None,
        processors: tuple[Processor, ...],
        rng: RandomSource,
        shown: Tensor | None = None,
    ) -> None:
        self.models, self.mixture, self.rng = models, mixture, rng
        self.most, self.stop, self.processors, self.shown = max_new_tokens, stop, processors, shown
        batch, device = len(input_ids), input_ids.device
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.long, device=device)
        self.ids = torch.cat([input_ids, input_ids.new_zeros(batch, max_new_tokens + spare)], -1)
        self.rows, self.lengths, self.start = torch.arange(batch, device=device), lengths.clone(), lengths.clone()
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.said, self.counts = input_ids.new_zeros(batch, max_new_tokens), torch.zeros_like(lengths)
        self.notes = {
            name: torch.full((batch, max_new_tokens), torch.nan, dtype=torch.float64, device=device) for name in NOTES
        }
        # places that every model can read; a request that fits is never drafted beyond them
        self.context = min(getattr(model, "context", None) or self.ids.shape[1] for model in models.values())
        self.drafts, self.drafted = 0, 0
        self.examined, self.kept, self.forwards = (dict.fromkeys(models, 0) for _ in range(3))

    @property
    def made(self) -> Tensor:
        """New tokens of each row, (B,)."""
        return self.lengths - self.start

    @property
    def active(self) -> Tensor:
        """Rows that still want tokens, (B,) bool."""
        return ~self.ended & (self.made < self.most)

    def drop_ended(self) -> Tensor:
        """Let the rows go that want no more tokens, so that nobody reads them again. Returns which stay, (B,) bool."""
        stay = self.active
        self.rows, self.ids, self.lengths, self.start, self.ended = (
            part[stay] for part in (self.rows, self.ids, self.lengths, self.start, self.ended)
        )
        for model in self.models.values():
            if hasattr(model, "keep_rows"):
                model.keep_rows(stay)
        return stay

    def score(self, name: str, offset: int | Tensor, count: int) -> Tensor:
        """One forward: (B, count, V) tempered log-probabilities at `offset`, perhaps by row, beyond what is settled.

        Anything for ended rows.
        """
        self.forwards[name] += 1
        active, wanted = self.active, self.lengths + offset
        # ended rows must not widen the forward
        within = torch.where(active, wanted, wanted[active].min())
        return self.mixture.tempered(self.models[name](self.ids, within, count))

    def write(self, tokens: Tensor, offset: int | Tensor) -> None:
        """Put tokens (B,) at `offset`, perhaps by row, beyond what is settled."""
        self.ids.scatter_(1, (self.lengths + offset).unsqueeze(-1), tokens.unsqueeze(-1))

    def text(self, row: int, length: int) -> Tensor:
        """The ids (n,) of a row as processors and stop see them, of which the models read the first `length`."""
        if self.shown is None:
            return self.ids[row, :length]
        return torch.cat([self.shown[self.rows[row]], self.ids[row, int(self.start[row]) : length]])

    def target_law(self, theta: Tensor, target: Tensor) -> NextTokenDist:
        """q* at the next places, from both models' (B, G, V).

        Behind a draft that is certain to be refused there may be no q*; such a place has weight NaN and is never settled.
        """
        dead = ~(theta.isfinite() & target.isfinite()).any(-1)
        if not bool(dead.any()):
            return self._law(theta, target)
        even = torch.zeros_like(theta).log_softmax(-1)
        mixture = self._law(*(torch.where(dead.unsqueeze(-1), even, part) for part in (theta, target)))
        return mixture._replace(alpha=mixture.alpha.masked_fill(dead, torch.nan), theta=theta, target=target)

    def _law(self, theta: Tensor, target: Tensor) -> NextTokenDist:
        if not self.processors:
            return self.mixture(theta, target)
        whole = MixtureDist(self.mixture.theta_weight)(theta, target)
        log_q = whole.log_q.clone()
        for row, length in enumerate(self.lengths.tolist()):
            for k in range(log_q.shape[1]):
                for process in self.processors:
                    log_q[row, k] = process(self.text(row, length + k).unsqueeze(0), log_q[row : row + 1, k])[0]
        return whole._replace(log_q=self.mixture.truncated(log_q.log_softmax(-1)))

    def append(self, rows: Tensor, tokens: Tensor, mixture: NextTokenDist) -> None:
        """Put tokens (B,) at the end of the rows (B,) bool that have not ended; law is that of the place, (B, V)."""
        rows = rows & self.active
        row = rows.nonzero().squeeze(-1)
        if bool(mixture.alpha[row].isnan().any()):
            raise no_common_token(mixture.theta[row], mixture.target[row])
        self.ids[row, self.lengths[row]] = tokens[row]
        request, place = self.rows[row], self.made[row]
        self.said[request, place] = tokens[row]
        self.counts[request] += 1
        for name in NOTES:
            value = getattr(mixture, name)
            figure = value[row] if value.ndim == 1 else value[row, tokens[row]]
            self.notes[name][request, place] = figure.double()
        self.lengths = self.lengths + rows.long()
        self.ended = self.ended | (rows & torch.isin(tokens, self.eos_ids))
        if self.stop is not None:
            for k in row.tolist():
                self.ended[k] |= bool(self.stop(self.text(k, int(self.lengths[k]))))

    def settle(self, rows: Tensor, tokens: Tensor, mixture: NextTokenDist, proposer: str, proposal: Tensor) -> Tensor:
        """Keep or replace one token of each of the rows, proposed with log-probabilities `proposal` (B, V).

        Returns which were kept, (B,) bool.
        """
        own = proposal.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        wanted = mixture.log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        kept = self.rng.accept(wanted - own) & rows
        refused = rows & ~kept
        self.count(proposer, int(rows.sum()), int(kept.sum()))
        if bool(refused.any()):
            other = self.rng.choose(residual(mixture.log_q, proposal))
            tokens = torch.where(refused, other, tokens)
        self.append(rows, tokens, mixture)
        return kept

    def count(self, proposer: str, examined: int, kept: int) -> None:
        self.examined[proposer] += examined
        self.kept[proposer] += kept

    def output(self) -> QStarOutput:
        beyond = torch.arange(self.most, device=self.ids.device) >= self.counts.unsqueeze(-1)
        tokens = self.said.masked_fill(beyond, int(self.eos_ids[0]) if len(self.eos_ids) else 0)
        n = self.notes
        return QStarOutput(
            tokens, self.counts, n["alpha"], n["chernoff"], n["theta"], n["target"], n["log_q"],
            self.drafts, self.drafted, self.examined, self.kept, self.forwards,
        )  # fmt: skip
