r"""Exact samples of q* ∝ π_θ^α π_t^(1-α): one model drafts a few tokens, the others verify them in one forward pass each.

A drafted token x ~ p is accepted with probability min(1, q*(x)/p(x)). After a rejection the token is drawn from
norm((q* - p)+), and the rest of the draft is dropped. The texts have distribution q*, with verification token by token
(Leviathan et al., 2023) or as a block (Sun et al., Block Verification, 2024), which accepts at least as many tokens.

After a draft of π_θ or π_t that is accepted whole, the verifier knows only its own distribution at the next position. A token
drawn from that alone would not have distribution q*. Two exact rules:
- `carry`: the drafter runs once more, and q* is sampled.
- `alternate`: the verifier's token is a proposal, which the drafter verifies in its next forward pass.
Where a third model drafts, both have run at the next position, and q* is sampled there without a further pass.
Legend: B batch, L columns, G drafted tokens (gamma), V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.functional.errors import UsageError
from models.functional.qstar_speed import best_gamma
from models.interfaces.decoder import TokenCallback
from models.speculative.distribution import MixtureDist
from models.speculative.options import MAX_GAMMA, DraftOptions
from models.speculative.random_source import RandomSource
from models.speculative.roles import Roles, roles
from models.speculative.state import QStarOutput, QStarRun, Scores, TextRules
from models.speculative.verification import VERIFICATIONS, Drafted

# the acceptance that gamma="auto" begins with: three of four tokens
PRIOR_ACCEPTED, PRIOR_VERIFIED = 3, 4
# where gamma="auto" expects no gain, one token is drafted every so many rounds, to go on measuring the acceptance rate
PROBE_EVERY = 16


class Pending(NamedTuple):
    """A next position that only the verifier has seen, in rows (B,) bool whose draft was accepted whole.

    verifier (B, V): its log-probabilities there. proposal (B,): its token, where the scheme is `alternate`.
    """

    rows: Tensor
    verifier: Tensor
    proposal: Tensor | None

    def of_rows(self, stay: Tensor) -> "Pending":
        """Without the rows that are False in stay (B,)."""
        return Pending._make(None if part is None else part[stay] for part in self)


def decode_qstar(
    theta: Scores,
    target: Scores,
    input_ids: Tensor,
    drafting: DraftOptions,
    rules: TextRules,
    *,
    rng: RandomSource,
    lengths: Tensor | None = None,
    assistant: Scores | None = None,
    mixture: MixtureDist | None = None,
    on_tokens: TokenCallback | None = None,
) -> QStarOutput:
    """Texts with distribution q* after prompts input_ids (B, L), right-padded, of which lengths (B,) count; None: all.

    assistant: the third model of draft=assistant. mixture: q* itself; None is the one equally far from both models.
    on_tokens: called after every round with all new tokens so far (1, n), for a batch of one.
    Raises UsageError for a third model without draft=assistant or the other way round, and where q* does not exist.
    """
    if (drafting.draft == "assistant") != (assistant is not None):
        raise UsageError("draft=assistant needs a third model, and a third model needs draft=assistant")
    if on_tokens is not None and len(input_ids) > 1:
        raise UsageError(f"tokens can be streamed of one text at a time, not of {len(input_ids)}")
    who = roles(drafting)
    if lengths is None:
        lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    models = {"theta": theta, "target": target} | ({} if assistant is None else {"assistant": assistant})
    run = QStarRun(
        models, input_ids, lengths, rules=rules, draft_columns=drafting.max_gamma + 2, mixture=mixture or MixtureDist(), rng=rng
    )  # fmt: skip
    pending: Pending | None = None
    rounds = 0
    while bool(run.active.any()):
        # 1. rows that have ended leave the batch
        if not bool(run.active.all()):
            stay = run.drop_ended()
            pending = pending and pending.of_rows(stay)
        # 2. a draft is made and verified; without one, both models run and q* is sampled
        gamma = _draft_length(run, drafting, who, rounds)
        if gamma > 0:
            pending = _draft_and_verify(run, pending, gamma, drafting, who)
        else:
            pending = None  # its proposal was not committed, so it may be dropped
            dist = run.next_token_dist(run.score("theta", 0, 1), run.score("target", 0, 1)).at(0)
            run.sample(run.active, dist)
        rounds += 1
        if on_tokens is not None:
            on_tokens(run.ids[:, int(run.start[0]) : int(run.lengths[0])])
    return run.output()


def _draft_and_verify(
    run: QStarRun, pending: Pending | None, gamma: int, drafting: DraftOptions, who: Roles
) -> Pending | None:
    """One round. Returns the position that it leaves pending."""
    # 1. the drafter's first forward pass resolves what is pending, and begins the draft of all other rows
    first = None
    if pending is not None and bool((pending.rows & run.active).any()):
        first = _resolve(run, pending, who)
        if not bool(run.active.any()):
            return None
    # 2. the draft
    draft = _propose(run, gamma, who.drafter, first)
    # 3. one forward pass of each verifier over all positions of the draft and the one after it
    size = draft.tokens.shape[1]
    verifiers = {name: run.score(name, 0, size + 1) for name in who.verifiers}  # (B, G + 1, V)
    if who.drafter == "assistant":
        dist = run.next_token_dist(**verifiers)
    else:
        (name,) = who.verifiers
        dist = run.next_token_dist(**{who.drafter: draft.logp, name: verifiers[name][:, :size]})
    # 4. how much of the draft is accepted
    run.drafts += int(run.active.sum())
    run.drafted_tokens += int(draft.lengths[run.active].sum())
    whole = VERIFICATIONS[drafting.verify](run, draft, dist.at(slice(size)))
    # 5. the position after a draft that was accepted whole: q* where all models have run, else pending
    if not bool(whole.any()):
        return None
    if who.drafter == "assistant":
        run.sample(whole, dist.at(size))
        return None
    after = verifiers[who.verifiers[0]][torch.arange(len(whole), device=whole.device), draft.lengths]
    return Pending(whole, after, run.rng.choose(after.exp()) if drafting.draft == "alternate" else None)


def _resolve(run: QStarRun, pending: Pending, who: Roles) -> tuple[Tensor, Tensor]:
    """One forward pass of the drafter, which commits a token where one is pending.

    Returns the rows whose draft may begin with this pass (B,) bool, and the drafter's log-probabilities (B, V) there.
    """
    drafter, (verifier,) = who.drafter, who.verifiers
    rows = pending.rows & run.active
    if pending.proposal is None:  # carry: both models have run at the position now
        own = run.score(drafter, 0, 1)
        run.sample(rows, run.next_token_dist(**{drafter: own, verifier: pending.verifier.unsqueeze(1)}).at(0))
        return run.active & ~rows, own[:, 0]
    # alternate: the drafter verifies the proposal, and sees one position more where it is accepted
    run.write(pending.proposal, 0)
    own = run.score(drafter, 0, 2)
    dist = run.next_token_dist(**{drafter: own[:, :1], verifier: pending.verifier.unsqueeze(1)}).at(0)
    accepted = run.verify(rows, pending.proposal, dist, verifier, pending.verifier)
    return run.active & (accepted | ~rows), torch.where(accepted.unsqueeze(-1), own[:, 1], own[:, 0])


def _propose(run: QStarRun, gamma: int, drafter: str, first: tuple[Tensor, Tensor] | None) -> Drafted:
    """A draft for every row, as long as the row with most room allows. Tokens beyond a row's room are never committed.

    first: rows (B,) bool where the drafter's log-probabilities (B, V) at the next position are known. The other rows draft
    one token less, so that no forward pass is spent on them alone.
    """
    # a request that does not fit the context is the models' to judge
    within = max(1, run.context - int(run.lengths[run.active].max()))
    size = min(gamma, int(run.remaining[run.active].max()), within)
    lengths, tokens, logp = torch.zeros_like(run.lengths), run.ids.new_zeros(len(run.ids), size), None
    for k in range(size):
        if k == 0 and first is not None and bool(first[0].any()):
            rows, own = first
        else:
            rows, own = run.active, run.score(drafter, lengths, 1)[:, 0]
        if logp is None:
            logp = own.unsqueeze(1).repeat(1, size, 1)  # (B, G, V); positions without a drafted token stay as filled
        drawn, row = run.rng.choose(own.exp()), rows.nonzero().squeeze(-1)
        run.write(drawn, lengths)
        tokens[row, lengths[row]], logp[row, lengths[row]] = drawn[row], own[row]
        lengths = lengths + rows.long()
    assert logp is not None  # size is at least 1
    return Drafted(drafter, tokens, lengths, logp)


def _draft_length(run: QStarRun, drafting: DraftOptions, who: Roles, rounds: int) -> int:
    """gamma, or the length of the highest expected speed-up at the drafter's acceptance rate so far.

    It depends on past draws only, so the distribution of the next token is q* for any value.
    """
    if drafting.gamma != "auto":
        return drafting.gamma
    beta = (run.accepted[who.drafter] + PRIOR_ACCEPTED) / (run.verified[who.drafter] + PRIOR_VERIFIED)
    best = best_gamma(beta, who.cost, who.formula, MAX_GAMMA, drafting.position_cost)
    return best or int(rounds % PROBE_EVERY == PROBE_EVERY - 1)
