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
from typing import Literal, get_args

import torch
from torch import Tensor

from models.decoding.chance import Chance
from models.decoding.qstar_law import QStarLaw
from models.decoding.qstar_roles import Draft, Roles, roles
from models.decoding.qstar_run import Processor, QStarOutput, QStarRun, Scores
from models.decoding.verification import VERIFICATIONS
from models.functional.errors import UsageError, require_choice
from models.functional.qstar_speed import best_gamma

MOST_GAMMA = 16
# what `gamma="auto"` believes before it has seen a draft: three of four tokens kept
PRIOR_KEPT, PRIOR_EXAMINED = 3, 4


def decode_qstar(
    theta: Scores,
    target: Scores,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    chance: Chance,
    lengths: Tensor | None = None,
    assistant: Scores | None = None,
    law: QStarLaw | None = None,
    gamma: int | Literal["auto"] = 4,
    draft: Draft = "theta",
    verify: Literal["token", "block"] = "token",
    cost: float = 1.0,
    eos_ids: tuple[int, ...] = (),
    stop: Callable[[Tensor], bool] | None = None,
    processors: tuple[Processor, ...] = (),
    settled: Callable[[Tensor], None] | None = None,
    shown: Tensor | None = None,
) -> QStarOutput:
    """Tokens with the law of q* after prompts input_ids (B, L), right-padded, of which `lengths` (B,) are real.

    draft: who proposes, `theta`, `target` or `assistant`; `alternate` is the cheaper of the two models, with the checker's
    own token as the next proposal. gamma: tokens of a draft; 0 evaluates both models at every token, the plain reference;
    `auto` is the best for the share of proposals kept so far. cost: seconds of a forward of theta over one of target; with an
    assistant, seconds of its forward over both.
    eos_ids, stop (of the ids (n,) of a row), processors (on log q*), shown (prompts as those two see them): see `QStarRun`.
    settled: called after every round with the new tokens (n,), for a batch of one.
    """
    require_choice("draft", draft, get_args(Draft))
    require_choice("verify", verify, VERIFICATIONS)
    _check(gamma, max_new_tokens, cost, draft, assistant, settled, len(input_ids))
    who = roles(draft, cost)
    if lengths is None:
        lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    models = {"theta": theta, "target": target} | ({"assistant": assistant} if draft == "assistant" else {})
    run = QStarRun(
        models, input_ids, lengths, max_new_tokens=max_new_tokens, spare=MOST_GAMMA + 2 if gamma == "auto" else gamma + 2,
        law=law or QStarLaw(), eos_ids=eos_ids, stop=stop, processors=processors, chance=chance, shown=shown,
    )  # fmt: skip
    pending: tuple[Tensor, Tensor, Tensor] | None = None  # rows, tokens, the checker's distribution at their place
    while bool(run.active.any()):
        before = int(run.lengths[0])
        if gamma == 0:
            here = run.target_law(run.score("theta", 0, 1), run.score("target", 0, 1)).at(0)
            run.append(run.active, chance.choose(here.log_q.exp()), here)
        else:
            pending = _round(run, pending, _draft_length(run, gamma, who), who, draft == "alternate", verify)
        if settled is not None:
            settled(run.ids[0, before : int(run.lengths[0])])
    return run.output()


def _round(
    run: QStarRun,
    pending: tuple[Tensor, Tensor, Tensor] | None,
    gamma: int,
    who: Roles,
    alternate: bool,
    verify: str,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """One draft and its verification. Returns the checker's proposal for the next round, where there is one."""
    drafter, checkers = who.drafter, who.checkers
    # 1. the checker's proposal of the last round, checked by the drafter, which also looks one place further
    further = None
    if pending is not None and bool((pending[0] & run.active).any()):
        rows, tokens, theirs = pending[0] & run.active, pending[1], pending[2]
        run.write(tokens, 0)
        own = run.score(drafter, 0, 2)
        here = run.target_law(**{drafter: own[:, :1], checkers[0]: theirs.unsqueeze(1)}).at(0)
        kept = run.settle(rows, tokens, here, checkers[0], theirs)
        if not bool(run.active.any()):
            return None
        further = own[:, 1] if bool((kept | ~run.active).all()) else None
    # 2. a draft, no longer than some row has room for; what goes beyond a row's room is never settled
    # a request that does not fit is the models' to judge
    within = max(1, run.context - int(run.lengths[run.active].max()))
    size = min(gamma, int((run.most - run.made)[run.active].max()), within)
    own, drafts = [], []
    for k in range(size):
        own.append(further if k == 0 and further is not None else run.score(drafter, k, 1)[:, 0])
        drafts.append(run.chance.choose(own[-1].exp()))
        run.write(drafts[-1], k)
    proposal, drafted = torch.stack(own, 1), torch.stack(drafts, 1)  # (B, G, V), (B, G)
    # 3. one forward of each checker at all places of the draft and the one after it
    theirs = {name: run.score(name, 0, size + 1) for name in checkers}  # (B, G + 1, V)
    if drafter == "assistant":
        law = run.target_law(**theirs)
    else:
        law = run.target_law(**{drafter: proposal, checkers[0]: theirs[checkers[0]][:, :size]})
    # 4. how much of the draft is kept
    run.drafts += int(run.active.sum())
    run.drafted += size * int(run.active.sum())
    whole = VERIFICATIONS[verify](run, drafted, law.at(slice(size)), drafter, proposal)
    # 5. one token more where all of it was
    if not bool(whole.any()):
        return None
    if alternate:
        last = theirs[checkers[0]][:, size]
        return whole, run.chance.choose(last.exp()), last
    if drafter == "assistant":
        after = law.at(size)
    else:
        own_last = run.score(drafter, 0, 1)
        after = run.target_law(**{drafter: own_last, checkers[0]: theirs[checkers[0]][:, size:]}).at(0)
    run.append(whole, run.chance.choose(after.log_q.exp()), after)
    return None


def _draft_length(run: QStarRun, gamma: int | str, who: Roles) -> int:
    """gamma, or the length of the highest expected speed-up at the share of the drafter's tokens kept so far.

    It depends on what has happened only, so the law of what comes next is q* for any value.
    """
    if gamma != "auto":
        return gamma
    beta = (run.kept[who.drafter] + PRIOR_KEPT) / (run.examined[who.drafter] + PRIOR_EXAMINED)
    return best_gamma(beta, who.cost, who.formula, MOST_GAMMA)


def _check(
    gamma: int | str, max_new_tokens: int, cost: float, draft: str, assistant: object, settled: object, batch: int
) -> None:
    require_draft_length("gamma", gamma)
    if max_new_tokens < 1 or cost <= 0:
        raise UsageError(f"max_new_tokens={max_new_tokens} must be at least 1 and cost={cost} above 0")
    if (draft == "assistant") != (assistant is not None):
        raise UsageError("draft=assistant needs a third model, and a third model needs draft=assistant")
    if settled is not None and batch > 1:
        raise UsageError(f"tokens can be streamed of one text at a time, not of {batch}")


def require_draft_length(option: str, gamma: int | str) -> None:
    """Raise UsageError, naming the option, unless gamma is `auto` or a whole number from 0 on."""
    if gamma != "auto" and (not isinstance(gamma, int) or gamma < 0):
        raise UsageError(f"{option}={gamma} must be a whole number, at least 0, or auto")
