r"""Exact samples of q* ∝ π_θ^α π_t^(1-α): a draft of a few tokens is checked by all models in one forward each.

A draft x ~ p is kept with probability min(1, q*(x)/p(x)); after a rejection the token is drawn from norm((q* - p)+), and the
rest of the draft is dropped. What comes out has the law of q*, token by token (Leviathan et al., 2023), or block by block with
`verify="block"` (Sun et al., Block Verification, 2024), which keeps at least as many.
Where one of the two models drafts, the other knows only its own distribution one place beyond a draft that is kept whole, and
a token drawn from it would not be q*'s. Two exact ways on: `carry` (the drafter is run once more and q* is drawn), and
`alternate` (the checker's token is a proposal that the drafter checks in its next forward). Where a third model drafts, both
have looked there, and the token is free.
Legend: B batch, L columns, G drafted tokens (gamma), V vocabulary.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from models.functional.errors import UsageError, require_choice
from models.functional.qstar_speed import best_gamma
from models.speculative.distribution import MixtureDist
from models.speculative.random_source import RandomSource
from models.speculative.roles import Draft, Roles, roles
from models.speculative.state import Processor, QStarOutput, QStarRun, Scores
from models.speculative.verification import VERIFICATIONS, Drafted

MOST_GAMMA = 16
# what `gamma="auto"` believes before it has seen a draft: three of four tokens kept
PRIOR_KEPT, PRIOR_EXAMINED = 3, 4
# where `gamma="auto"` finds that drafts do not pay, every so many rounds one token is drafted all the same, to learn more
LOOK_AGAIN = 16


class Pending(NamedTuple):
    """What a round leaves open in `rows` (B,) bool, whose drafts were kept whole: the next place, seen by the checker alone.

    checker (B, V): its log-probabilities there. tokens (B,): its proposal, where the scheme is `alternate`.
    """

    rows: Tensor
    checker: Tensor
    tokens: Tensor | None


def decode_qstar(
    theta: Scores,
    target: Scores,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    rng: RandomSource,
    lengths: Tensor | None = None,
    assistant: Scores | None = None,
    mixture: MixtureDist | None = None,
    gamma: int | Literal["auto"] = 4,
    draft: Draft = "theta",
    verify: Literal["token", "block"] = "token",
    cost: float = 1.0,
    wide: float = 0.0,
    eos_ids: tuple[int, ...] = (),
    stop: Callable[[Tensor], bool] | None = None,
    processors: tuple[Processor, ...] = (),
    settled: Callable[[Tensor], None] | None = None,
    shown: Tensor | None = None,
) -> QStarOutput:
    """Tokens with the law of q* after prompts input_ids (B, L), right-padded, of which `lengths` (B,) are real.

    draft: who proposes, `theta`, `target` or `assistant`; `alternate` is the cheaper of the two models, with the checker's
    own token as the next proposal. gamma: tokens of a draft; 0 evaluates both models at every token, the plain reference;
    `auto` is the best for the share of proposals kept so far, which may be 0. cost: seconds of a forward of theta over one of
    target; with an assistant, seconds of its forward over both. wide: what each further place adds to a forward, as a share
    of it. Both only choose the draft's length and drafter: see `forward_costs`.
    eos_ids, stop (of the ids (n,) of a row), processors (on log q*), shown (prompts as those two see them): see `QStarRun`.
    settled: called after every round with the new tokens (n,), for a batch of one.
    """
    require_choice("draft", draft, get_args(Draft))
    require_choice("verify", verify, VERIFICATIONS)
    _check(gamma, max_new_tokens, cost, wide, draft, assistant, settled, len(input_ids))
    who = roles(draft, cost)
    if lengths is None:
        lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    models = {"theta": theta, "target": target} | ({"assistant": assistant} if draft == "assistant" else {})
    run = QStarRun(
        models, input_ids, lengths, max_new_tokens=max_new_tokens, spare=MOST_GAMMA + 2 if gamma == "auto" else gamma + 2,
        mixture=mixture or MixtureDist(), eos_ids=eos_ids, stop=stop, processors=processors, rng=rng, shown=shown,
    )  # fmt: skip
    pending: Pending | None = None
    rounds = 0
    while bool(run.active.any()):
        if not bool(run.active.all()):
            stay = run.drop_ended()
            pending = pending and Pending(*(None if part is None else part[stay] for part in pending))
        before = int(run.lengths[0])
        size = _draft_length(run, gamma, who, wide, rounds)
        if size == 0:  # what is pending may be forgotten: nothing was decided by it
            pending = None
            here = run.target_law(run.score("theta", 0, 1), run.score("target", 0, 1)).at(0)
            run.append(run.active, rng.choose(here.log_q.exp()), here)
        else:
            pending = _round(run, pending, size, who, draft == "alternate", verify)
        rounds += 1
        if settled is not None:
            settled(run.ids[0, before : int(run.lengths[0])])
    return run.output()


def _round(
    run: QStarRun, pending: Pending | None, gamma: int, who: Roles, alternate: bool, verify: str
) -> Pending | None:
    """One draft and its verification. Returns what it leaves open for the drafter's next forward."""
    # 1. what the last round left open; the drafter's forward that closes it begins the draft of every other row
    first = None
    if pending is not None and bool((pending.rows & run.active).any()):
        first = _close(run, pending, who)
        if not bool(run.active.any()):
            return None
    # 2. a draft
    draft = _propose(run, gamma, who.drafter, first)
    # 3. one forward of each checker at all places of the draft and the one after it
    size = draft.tokens.shape[1]
    theirs = {name: run.score(name, 0, size + 1) for name in who.checkers}  # (B, G + 1, V)
    if who.drafter == "assistant":
        mixture = run.target_law(**theirs)
    else:
        mixture = run.target_law(**{who.drafter: draft.logp, who.checkers[0]: theirs[who.checkers[0]][:, :size]})
    # 4. how much of the draft is kept
    run.drafts += int(run.active.sum())
    run.drafted += int(draft.lengths[run.active].sum())
    whole = VERIFICATIONS[verify](run, draft, mixture.at(slice(size)))
    # 5. the place after a draft that was kept whole: one token more where all models have seen it, else open
    if not bool(whole.any()):
        return None
    if who.drafter == "assistant":
        after = mixture.at(size)
        run.append(whole, run.rng.choose(after.log_q.exp()), after)
        return None
    checker = theirs[who.checkers[0]][torch.arange(len(whole), device=whole.device), draft.lengths]
    return Pending(whole, checker, run.rng.choose(checker.exp()) if alternate else None)


def _close(run: QStarRun, pending: Pending, who: Roles) -> tuple[Tensor, Tensor]:
    """One forward of the drafter that settles a token where one was open.

    Returns which rows may begin their draft with it (B,) bool, and the drafter's log-probabilities (B, V) there.
    """
    drafter, checker = who.drafter, who.checkers[0]
    rows = pending.rows & run.active
    if pending.tokens is None:  # both have seen the place now, and q* is drawn
        own = run.score(drafter, 0, 1)
        here = run.target_law(**{drafter: own, checker: pending.checker.unsqueeze(1)}).at(0)
        run.append(rows, run.rng.choose(here.log_q.exp()), here)
        return run.active & ~rows, own[:, 0]
    # the checker's token is a proposal like any other, and the drafter looks one place further where it is kept
    run.write(pending.tokens, 0)
    own = run.score(drafter, 0, 2)
    here = run.target_law(**{drafter: own[:, :1], checker: pending.checker.unsqueeze(1)}).at(0)
    kept = run.settle(rows, pending.tokens, here, checker, pending.checker)
    return run.active & (kept | ~rows), torch.where(kept.unsqueeze(-1), own[:, 1], own[:, 0])


def _propose(run: QStarRun, gamma: int, drafter: str, first: tuple[Tensor, Tensor] | None) -> Drafted:
    """A draft of every row, no longer than some row has room for; what goes beyond a row's room is never settled.

    first: rows (B,) bool where the drafter's log-probabilities (B, V) at the next place are known; the others draft one token
    less, so that no forward is spent on them alone.
    """
    # a request that does not fit is the models' to judge
    within = max(1, run.context - int(run.lengths[run.active].max()))
    size = min(gamma, int((run.most - run.made)[run.active].max()), within)
    lengths, tokens, logp = torch.zeros_like(run.lengths), run.ids.new_zeros(len(run.ids), size), None
    for k in range(size):
        if k == 0 and first is not None and bool(first[0].any()):
            rows, own = first
        else:
            rows, own = run.active, run.score(drafter, lengths, 1)[:, 0]
        if logp is None:
            logp = own.unsqueeze(1).repeat(1, size, 1)  # (B, G, V); what no token is drafted from stays as filled
        drawn, row = run.rng.choose(own.exp()), rows.nonzero().squeeze(-1)
        run.write(drawn, lengths)
        tokens[row, lengths[row]], logp[row, lengths[row]] = drawn[row], own[row]
        lengths = lengths + rows.long()
    return Drafted(drafter, tokens, lengths, logp)


def _draft_length(run: QStarRun, gamma: int | str, who: Roles, wide: float, rounds: int) -> int:
    """gamma, or the length of the highest expected speed-up at the share of the drafter's tokens kept so far.

    It depends on what has happened only, so the law of what comes next is q* for any value.
    """
    if gamma != "auto":
        return gamma
    beta = (run.kept[who.drafter] + PRIOR_KEPT) / (run.examined[who.drafter] + PRIOR_EXAMINED)
    best = best_gamma(beta, who.cost, who.formula, MOST_GAMMA, wide)
    return best or int(rounds % LOOK_AGAIN == LOOK_AGAIN - 1)


def _check(
    gamma: int | str,
    max_new_tokens: int,
    cost: float,
    wide: float,
    draft: str,
    assistant: object,
    settled: object,
    batch: int,
) -> None:
    require_draft_length("gamma", gamma)
    if max_new_tokens < 1 or cost <= 0 or wide < 0:
        raise UsageError(
            f"max_new_tokens={max_new_tokens} must be at least 1, cost={cost} above 0 and wide={wide} not below 0"
        )
    if (draft == "assistant") != (assistant is not None):
        raise UsageError("draft=assistant needs a third model, and a third model needs draft=assistant")
    if settled is not None and batch > 1:
        raise UsageError(f"tokens can be streamed of one text at a time, not of {batch}")


def require_draft_length(option: str, gamma: int | str) -> None:
    """Raise UsageError, naming the option, unless gamma is `auto` or a whole number from 0 on."""
    if gamma != "auto" and (not isinstance(gamma, int) or gamma < 0):
        raise UsageError(f"{option}={gamma} must be a whole number, at least 0, or auto")
