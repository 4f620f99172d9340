r"""Exact samples of q* ∝ π_θ^α π_t^(1-α): one model drafts a few tokens, the others verify them in one forward pass each.

A drafted token x ~ p is accepted with probability min(1, q*(x)/p(x)). After a rejection the token is drawn from
norm((q* - p)+), and the rest of the draft is dropped. The texts have distribution q*, with verification token by token
(Leviathan et al., 2023) or as a block (Sun et al., Block Verification, 2024), which accepts at least as many tokens.

After a draft of π_θ or π_t that is accepted whole, the verifier knows only its own distribution at the next position. A token
drawn from that alone would not have distribution q*. Two exact rules:
- `carry`: the drafter runs once more, and q* is sampled.
- `alternate`: the verifier's token is a proposal, which the drafter verifies in its next forward pass.
Where a third model drafts, both have run at the next position, and q* is sampled there without a further pass. A third model
that proposes blocks (`ProposesBlocks`) makes a draft in one forward pass, from hidden states that the verifiers have kept.

Speculative sampling of one model is the same loop, with that model as both.
Legend: B batch, L columns, G drafted tokens (gamma), V vocabulary.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.functional.errors import UsageError
from models.functional.qstar_speed import best_block_length, best_gamma
from models.interfaces.decoder import TokenCallback
from models.interfaces.scores import ProposesBlocks, StateScores
from models.speculative.distribution import MixtureDist, NextTokenDist
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
    assistant: Scores | ProposesBlocks | None = None,
    mixture: MixtureDist | None = None,
    on_tokens: TokenCallback | None = None,
) -> QStarOutput:
    """Texts with distribution q* after prompts input_ids (B, L), right-padded, of which lengths (B,) count; None: all.

    target may be the very object that theta is: q* is that model then, which runs once, where it does not draft itself.
    assistant: the third model of draft=assistant, or the `ProposesBlocks` of draft=block_drafter. mixture: q* itself; None is
    the one equally far from both models.
    on_tokens: called after every round with all new tokens so far (1, n), for a batch of one.
    Raises UsageError for a third model without its draft= or the other way round, and where q* does not exist.
    """
    if on_tokens is not None and len(input_ids) > 1:
        raise UsageError(f"tokens can be streamed of one text at a time, not of {len(input_ids)}")
    who = roles(drafting)
    _require_third(drafting, assistant)
    alone = target is theta and (who.third or drafting.gamma == 0)
    if alone:
        who = who.of_one_model()
    if lengths is None:
        lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    models: dict[str, Any] = {"theta": theta} | ({} if alone else {"target": target})
    models |= {} if assistant is None else {who.drafter: assistant}
    if isinstance(assistant, ProposesBlocks):
        if not _may_pay(drafting, assistant):  # then nothing is kept or tried for drafts
            drafting = replace(drafting, gamma=0)
        else:
            keep_states(models, assistant)
    run = QStarRun(
        models, input_ids, lengths, rules=rules, draft_columns=drafting.max_gamma + 2,
        mixture=mixture or MixtureDist(), rng=rng, shared_noise=drafting.verify == "shared_noise",
    )  # fmt: skip
    pending: Pending | None = None
    rounds = 0
    while bool(run.active.any()):
        # 1. rows that have ended leave the batch
        if not bool(run.active.all()):
            stay = run.drop_ended()
            pending = pending and pending.of_rows(stay)
        # 2. a draft is made and verified; without one, both models run and q* is sampled
        pending = one_round(run, pending, _draft_length(run, drafting, who, rounds), drafting, who)
        rounds += 1
        if on_tokens is not None:
            on_tokens(run.ids[:, int(run.start[0]) : int(run.lengths[0])])
    return run.output()


def one_round(run: QStarRun, pending: Pending | None, gamma: int, drafting: DraftOptions, who: Roles) -> Pending | None:
    """A draft of gamma tokens is made and verified; at 0 both models run and q* is sampled. Returns what is pending then."""
    if gamma > 0:
        return _draft_and_verify(run, pending, gamma, drafting, who)
    # a proposal that is pending was not committed, so it may be dropped
    run.undrafted += int(run.active.sum())
    dist = _both(run, {name: run.score(name, 0, 1) for name in ("theta", "target") if name in run.models}).at(0)
    run.sample(run.active, dist)
    return None


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
    draft = _propose_block(run, gamma, who.drafter) if who.in_blocks else _propose(run, gamma, who.drafter, first)
    # 3. one forward pass of each verifier over all positions of the draft and the one after it
    size = draft.tokens.shape[1]
    verifiers = {name: run.score(name, 0, size + 1) for name in who.verifiers}  # (B, G + 1, V)
    if who.third:
        dist = _both(run, verifiers)
    else:
        (name,) = who.verifiers
        dist = run.next_token_dist(**{who.drafter: draft.logp, name: verifiers[name][:, :size]})
    # 4. how much of the draft is accepted
    run.count_draft(draft.lengths)
    whole = VERIFICATIONS[drafting.verify](run, draft, dist.at(slice(size)))
    # 5. the position after a draft that was accepted whole: q* where all models have run, else pending
    if not bool(whole.any()):
        return None
    if who.third:
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
    size = _draft_size(run, gamma)
    lengths, tokens, logp = torch.zeros_like(run.lengths), run.ids.new_zeros(len(run.ids), size), None
    for k in range(size):
        if k == 0 and first is not None and bool(first[0].any()):
            rows, own = first
        else:
            rows, own = run.active, run.score(drafter, lengths, 1)[:, 0]
        if drafter == "assistant":  # of what q* cuts off nothing would be accepted
            own = run.mixture.truncated(own)
        if logp is None:
            logp = own.unsqueeze(1).repeat(1, size, 1)  # (B, G, V); positions without a drafted token stay as filled
        drawn, row = run.draw(own.exp(), lengths), rows.nonzero().squeeze(-1)
        run.write(drawn, lengths)
        tokens[row, lengths[row]], logp[row, lengths[row]] = drawn[row], own[row]
        lengths = lengths + rows.long()
    assert logp is not None  # size is at least 1
    return Drafted(drafter, tokens, lengths, logp)


def _propose_block(run: QStarRun, gamma: int, drafter: str) -> Drafted:
    """The same in one forward pass of the drafter."""
    blocks: Any = run.models[drafter]
    size = min(_draft_size(run, gamma), blocks.block_length)
    tokens, logp = run.propose(drafter, size)
    for k in range(size):
        run.write(tokens[:, k], k)
    return Drafted(drafter, tokens, torch.full_like(run.lengths, size), logp)


def _draft_size(run: QStarRun, gamma: int) -> int:
    """At most gamma, the room of the row with most room, and the context."""
    # a request that does not fit the context is the models' to judge
    within = max(1, run.context - int(run.lengths[run.active].max()))
    return min(gamma, int(run.remaining[run.active].max()), within)


def _both(run: QStarRun, found: dict[str, Tensor]) -> NextTokenDist:
    """q* from the log-probabilities (B, G, V) of theta and target, or of theta, which is both."""
    return run.next_token_dist(found["theta"], found.get("target", found["theta"]))


def _require_third(drafting: DraftOptions, third: Any) -> None:
    """Raise UsageError unless the third model is what draft= needs."""
    if (drafting.draft in ("assistant", "block_drafter")) != (third is not None):
        raise UsageError(
            "draft=assistant needs a third model, and a third model needs draft=assistant, or draft=block_drafter where it "
            "proposes blocks"
        )
    if third is not None and (drafting.draft == "block_drafter") != isinstance(third, ProposesBlocks):
        needed = "draft=block_drafter" if isinstance(third, ProposesBlocks) else "draft=assistant"
        raise UsageError(f"draft={drafting.draft} does not fit the third model; type {needed}")


def keep_states(models: dict[str, Any], drafter: ProposesBlocks) -> None:
    """Let the verifiers keep what the drafter reads. Raises UsageError for one that is not there or keeps no states."""
    for name, layers in drafter.state_layers.items():
        if not isinstance(models.get(name), StateScores):
            raise UsageError(
                f"the block drafter reads hidden states of {name}, which is not here or keeps none; decode with the models "
                "that it was trained with"
            )
        models[name].keep_states(layers)


def _may_pay(drafting: DraftOptions, drafter: ProposesBlocks) -> bool:
    """Whether drafts would be faster than none if all their tokens were accepted; a length that is given is taken."""
    return drafting.gamma > 0 if drafting.gamma != "auto" else _best_if_accepted(drafting, drafter) > 0


def _best_if_accepted(drafting: DraftOptions, drafter: ProposesBlocks) -> int:
    """The length of a block of the highest speed-up if all its tokens were accepted; 0 where even that is none."""
    longest = min(MAX_GAMMA, drafter.block_length)
    return best_block_length([1.0] * longest, drafting.cost, drafting.position_cost)


def _draft_length(run: QStarRun, drafting: DraftOptions, who: Roles, rounds: int) -> int:
    """gamma, or the length of the highest expected speed-up at the drafter's acceptance rates so far.

    It depends on past draws only, so the distribution of the next token is q* for any value.
    """
    if who.in_blocks and rounds == 0:
        return 0  # the verifiers read the prompt, so that there are states to draft from
    if drafting.gamma != "auto":
        return drafting.gamma
    probe = int(rounds % PROBE_EVERY == PROBE_EVERY - 1)
    if who.in_blocks:
        blocks: Any = run.models[who.drafter]
        longest = min(MAX_GAMMA, blocks.block_length)
        if not any(run.verified_at):  # a first draft tells more than rates that are guessed
            return _best_if_accepted(drafting, blocks)
        rates = [
            (accepted + PRIOR_ACCEPTED) / (verified + PRIOR_VERIFIED)
            for accepted, verified in zip(run.accepted_at[:longest], run.verified_at[:longest], strict=True)
        ]
        return best_block_length(rates, who.cost, drafting.position_cost) or probe
    beta = (run.accepted[who.drafter] + PRIOR_ACCEPTED) / (run.verified[who.drafter] + PRIOR_VERIFIED)
    return best_gamma(beta, who.cost, who.formula, MAX_GAMMA, drafting.position_cost) or probe
