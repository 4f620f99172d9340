r"""Exact samples of q* ∝ π_θ^α π_t^(1-α): one model drafts a few tokens, the other checks them all in one forward.

A draft x ~ p is kept with probability min(1, q*(x)/p(x)); after a rejection the token is drawn from norm((q* - p)+), and the
rest of the draft is dropped. What comes out has the law of q*, token by token (Leviathan et al., 2023), or block by block with
`verify="block"` (Sun et al., Block Verification, 2024), which keeps at least as many.
After a draft that is kept whole the checking model knows only its own distribution one place further, and a token drawn from
it would not be q*'s. Two exact ways on: `carry` (the drafter is run once more and q* is drawn), and `alternate` (the checker's
token is a proposal that the drafter checks in its next forward).
Legend: B batch, L columns, G drafted tokens (gamma), V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from models.decoding.chance import Chance
from models.functional.errors import UsageError, require_choice
from models.functional.qstar import mix, residual, solve_alpha, truncate

Draft = Literal["theta", "target", "alternate"]
Verify = Literal["token", "block"]
# (ids (B, L), lengths (B,), count) -> log-probabilities (B, count, V) of the tokens at places lengths, lengths + 1, ...
Scores = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class QStarOutput:
    """tokens (B, N) after the prompts; what is beyond a row's end token is that token again.

    alpha, chernoff, logp_theta, logp_t, log_q (B, N): of each token at its place.
    drafted: tokens of all drafts. examined, kept: each model's proposals that were looked at (those after a rejection are
    not) and that were kept. forwards: evaluations of each model, for the whole batch.
    """

    tokens: Tensor
    alpha: Tensor
    chernoff: Tensor
    logp_theta: Tensor
    logp_t: Tensor
    log_q: Tensor
    drafted: int = 0
    examined: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=lambda: {"theta": 0, "target": 0})

    @property
    def acceptance(self) -> dict[str, float]:
        """beta of each model's proposals: the share of the examined ones that were kept."""
        return {name: self.kept[name] / count for name, count in self.examined.items() if count}


class _Run:
    """The state of a batch that is being decoded, and the steps that change it."""

    def __init__(
        self,
        theta: Scores,
        target: Scores,
        input_ids: Tensor,
        lengths: Tensor,
        room: int,
        theta_weight: float | None,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        chance: Chance,
    ) -> None:
        self.models, self.chance = {"theta": theta, "target": target}, chance
        self.theta_weight, self.temperature, self.top_k, self.top_p = theta_weight, temperature, top_k, top_p
        batch = len(input_ids)
        self.active = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        self.ids = torch.cat([input_ids, input_ids.new_zeros(batch, room)], -1)
        self.lengths, self.start = lengths.clone(), lengths.clone()
        self.notes = {name: [[] for _ in range(batch)] for name in ("alpha", "chernoff", "theta", "target", "log_q")}
        self.drafted, self.examined, self.kept = 0, {"theta": 0, "target": 0}, {"theta": 0, "target": 0}
        self.forwards = {"theta": 0, "target": 0}

    def score(self, name: str, lengths: Tensor, count: int) -> Tensor:
        """One forward of a model: (B, count, V) log-probabilities at the temperature; anything for finished rows."""
        self.forwards[name] += 1
        # finished rows must not widen the forward
        within = torch.where(self.active, lengths, lengths[self.active].min())
        logp = self.models[name](self.ids, within, count)
        return logp if self.temperature == 1.0 else (logp / self.temperature).log_softmax(-1)

    def write(self, tokens: Tensor, places: Tensor) -> None:
        """Put tokens (B,) at places (B,), beyond what is settled."""
        self.ids.scatter_(1, places.unsqueeze(-1), tokens.unsqueeze(-1))

    def target_law(self, theta: Tensor, target: Tensor) -> dict[str, Tensor]:
        """q* at places (B, ...): log_q (B, ..., V) after top-k and top-p, alpha, chernoff, and both models'."""
        if self.theta_weight is None:
            alpha = solve_alpha(theta, target).alpha.to(theta.dtype)
        else:
            alpha = torch.full(theta.shape[:-1], self.theta_weight, dtype=theta.dtype, device=theta.device)
        log_q, log_z = mix(theta, target, alpha)
        log_q = truncate(log_q, self.top_k, self.top_p)
        return {"log_q": log_q, "alpha": alpha, "chernoff": -log_z, "theta": theta, "target": target}

    def append(self, rows: Tensor, tokens: Tensor, law: dict[str, Tensor]) -> None:
        """Put tokens (B,) at the end of the rows (B,) bool; law is that of the place, (B, V)."""
        for row in rows.nonzero().flatten().tolist():
            token = int(tokens[row])
            self.ids[row, self.lengths[row]] = token
            for name in ("alpha", "chernoff"):
                self.notes[name][row].append(law[name][row])
            for name in ("theta", "target", "log_q"):
                self.notes[name][row].append(law[name][row, token])
        self.lengths = self.lengths + rows.long()

    def settle(self, rows: Tensor, tokens: Tensor, law: dict[str, Tensor], drafter: str) -> Tensor:
        """Keep or replace one drafted token of each of the rows; returns which were kept, (B,) bool."""
        own = law[drafter].gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        wanted = law["log_q"].gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        kept = self.chance.accept(wanted - own) & rows
        refused = rows & ~kept
        if bool(refused.any()):
            other = self.chance.choose(residual(law["log_q"], law[drafter]))
            tokens = torch.where(refused, other, tokens)
        self.append(rows, tokens, law)
        self.count(drafter, int(rows.sum()), int(kept.sum()))
        return kept

    def count(self, proposer: str, examined: int, kept: int) -> None:
        self.examined[proposer] += examined
        self.kept[proposer] += kept


def decode_qstar(
    theta: Scores,
    target: Scores,
    input_ids: Tensor,
    *,
    lengths: Tensor | None = None,
    max_new_tokens: int,
    gamma: int = 4,
    draft: Draft = "theta",
    verify: Verify = "token",
    theta_weight: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    chance: Chance,
) -> QStarOutput:
    """Tokens with the law of q* after prompts input_ids (B, L), right-padded, of which `lengths` (B,) are real.

    draft: who proposes, `theta` or `target`; `alternate` is theta with the checker's own token as the next proposal.
    gamma: tokens of a draft; 0 evaluates both models at every token, the plain reference.
    theta_weight: alpha for every place; None solves for equal divergences at each. Temperature acts on both models before
    mixing, top_k and top_p on q* after it.
    """
    require_choice("draft", draft, get_args(Draft))
    require_choice("verify", verify, get_args(Verify))
    if gamma < 0 or max_new_tokens < 1 or temperature <= 0:
        raise UsageError(f"gamma={gamma} must be at least 0, max_new_tokens={max_new_tokens} and temperature above 0")
    if theta_weight is not None and not 0 <= theta_weight <= 1:
        raise UsageError(f"theta_weight={theta_weight} must lie between 0 and 1, or be null for equal divergences")
    drafter, checker = ("target", "theta") if draft == "target" else ("theta", "target")
    if lengths is None:
        lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    room = max_new_tokens + gamma + 2
    run = _Run(theta, target, input_ids, lengths, room, theta_weight, temperature, top_k, top_p, chance)
    pending: tuple[Tensor, Tensor, Tensor] | None = None  # rows, tokens, the checker's distribution at their place
    while True:
        active = run.active = _active(run, max_new_tokens, eos_id)
        if not bool(active.any()):
            break
        if gamma == 0:
            law = run.target_law(**{name: run.score(name, run.lengths, 1)[:, 0] for name in ("theta", "target")})
            run.append(active, chance.choose(law["log_q"].exp()), law)
            continue
        # 1. the checker's proposal of the last round, checked by the drafter, which also looks one place further
        further = None
        if pending is not None and bool((pending[0] & active).any()):
            rows, tokens, theirs = pending[0] & active, pending[1], pending[2]
            run.write(tokens, run.lengths)
            own = run.score(drafter, run.lengths, 2)
            law = run.target_law(**{drafter: own[:, 0], checker: theirs})
            kept = run.settle(rows, tokens, law, checker)
            active = run.active = active & _active(run, max_new_tokens, eos_id)
            if not bool(active.any()):
                break
            further = own[:, 1] if bool((kept | ~active).all()) else None
        pending = None
        # 2. a draft, no longer than any row has room for
        own, size = [], min(gamma, int((max_new_tokens - (run.lengths - run.start))[active].min()))
        for k in range(size):
            own.append(further if k == 0 and further is not None else run.score(drafter, run.lengths + k, 1)[:, 0])
            run.write(chance.choose(own[-1].exp()), run.lengths + k)
        drafts = run.ids.gather(1, run.lengths.unsqueeze(-1) + torch.arange(size, device=run.ids.device)).clone()
        own = torch.stack(own, 1)  # (B, G, V)
        # 3. one forward of the checker at all places of the draft and the one after it
        theirs = run.score(checker, run.lengths, size + 1)  # (B, G + 1, V)
        law = run.target_law(**{drafter: own, checker: theirs[:, :size]})
        # 4. how much of the draft is kept
        run.drafted += size * int(active.sum())
        settle = _settle_block if verify == "block" else _settle_tokens
        whole = settle(run, active, drafts, law, drafter) & _active(run, max_new_tokens, eos_id)
        # 5. one token more where all of it was
        if not bool(whole.any()):
            continue
        if draft == "alternate":
            pending = (whole, chance.choose(theirs[:, size].exp()), theirs[:, size])
        else:
            last = run.score(drafter, run.lengths, 1)[:, 0]
            after = run.target_law(**{drafter: last, checker: theirs[:, size]})
            run.append(whole, chance.choose(after["log_q"].exp()), after)
    return _finish(run, max_new_tokens, eos_id)


def _active(run: _Run, max_new_tokens: int, eos_id: int | None) -> Tensor:
    """Rows that still want tokens, (B,) bool."""
    made = run.lengths - run.start
    active = made < max_new_tokens
    if eos_id is not None:
        place = torch.arange(run.ids.shape[1], device=run.ids.device)
        new = (place >= run.start.unsqueeze(-1)) & (place < run.lengths.unsqueeze(-1))
        active = active & ~((run.ids == eos_id) & new).any(-1)
    return active


def _settle_tokens(run: _Run, active: Tensor, drafts: Tensor, law: dict[str, Tensor], drafter: str) -> Tensor:
    """Each token is kept on its own, until one is not. Returns the rows whose draft was kept whole."""
    alive = active
    for k in range(drafts.shape[1]):
        if not bool(alive.any()):
            break
        alive = run.settle(alive, drafts[:, k], {name: part[:, k] for name, part in law.items()}, drafter)
    return alive


def _settle_block(run: _Run, active: Tensor, drafts: Tensor, law: dict[str, Tensor], drafter: str) -> Tensor:
    """The longest prefix that joint verification keeps. Returns the rows whose draft was kept whole.

    p_i = min(1, p_{i-1} q(x_i)/p(x_i)); prefix i is kept with h_i = S_i / (S_i + 1 - p_i), S_i = Σ (p_i q - p)+ at the next
    place, and h_G = p_G. After prefix i < G the next token is drawn from norm((p_i q - p)+).
    """
    gamma = drafts.shape[1]
    q, p = law["log_q"].exp(), law[drafter].exp()
    ratio = (law["log_q"] - law[drafter]).gather(-1, drafts.unsqueeze(-1)).squeeze(-1).exp()  # (B, G)
    weight, best, rest = torch.ones_like(ratio[:, 0]), torch.zeros_like(run.lengths), []
    for k in range(gamma + 1):
        if k > 0:
            weight = (weight * ratio[:, k - 1]).clamp(max=1.0)
        if k == gamma:
            chance = weight
        else:
            excess = (weight.unsqueeze(-1) * q[:, k] - p[:, k]).clamp(min=0)
            rest.append(excess)
            total = excess.sum(-1)
            chance = torch.where(weight < 1, total / (total + 1 - weight).clamp(min=1e-300), 1.0)
        if k > 0:
            best = torch.where(run.chance.accept(chance.log()), k, best)
    for k in range(gamma):
        rows = active & (best > k)
        if bool(rows.any()):
            run.append(rows, drafts[:, k], {name: part[:, k] for name, part in law.items()})
    run.count(drafter, int((best[active] + 1).clamp(max=gamma).sum()), int(best[active].sum()))
    for k in range(gamma):
        rows = active & (best == k)
        if bool(rows.any()):
            mass = rest[k].sum(-1, keepdim=True)
            token = run.chance.choose(torch.where(mass > 0, rest[k], q[:, k]))
            run.append(rows, token, {name: part[:, k] for name, part in law.items()})
    return active & (best == gamma)


def _finish(run: _Run, most: int, eos_id: int | None) -> QStarOutput:
    """Cut every row at `most` tokens and at its end token."""
    batch, device = len(run.ids), run.ids.device
    tokens = run.ids.gather(1, run.start.unsqueeze(-1) + torch.arange(most, device=device))
    notes = {}
    for name, rows in run.notes.items():
        padded = torch.full((batch, most), torch.nan, dtype=torch.float64, device=device)
        for row, values in enumerate(rows):
            kept = torch.stack(values)[:most].double() if values else padded[row, :0]
            padded[row, : len(kept)] = kept
        notes[name] = padded
    if eos_id is not None:
        after = (tokens == eos_id).long().cumsum(-1) - (tokens == eos_id).long() > 0
        tokens = tokens.masked_fill(after, eos_id)
        notes = {name: values.masked_fill(after, torch.nan) for name, values in notes.items()}
    return QStarOutput(
        tokens, notes["alpha"], notes["chernoff"], notes["theta"], notes["target"], notes["log_q"],
        run.drafted, run.examined, run.kept, run.forwards,
    )  # fmt: skip
