"""How much of a draft is accepted: token by token (Leviathan et al., 2023), as a block (Sun et al., 2403.10444), by equality.

Rows of a batch may have drafts of different lengths.
Legend: B batch, G tokens of the longest draft, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.functional.next_token import until_end
from models.speculative.distribution import NextTokenDist
from models.speculative.options import Verify
from models.speculative.state import QStarRun


class Drafted(NamedTuple):
    """tokens (B, G), the first `lengths` (B,) of each row drafted by `drafter` from its log-probabilities logp (B, G, V)."""

    drafter: str
    tokens: Tensor
    lengths: Tensor
    logp: Tensor


# (run, the draft, q* at its positions) -> rows whose draft was accepted whole (B,) bool; an empty draft is
Verification = Callable[[QStarRun, Drafted, NextTokenDist], Tensor]


def verify_tokens(run: QStarRun, draft: Drafted, dist: NextTokenDist) -> Tensor:
    """Each token is accepted with probability min(1, q/p), until one is rejected and replaced."""
    unrejected = run.active
    for k in range(draft.tokens.shape[1]):
        rows = unrejected & (draft.lengths > k)
        if not bool(rows.any()):
            break
        accepted = run.verify(rows, draft.tokens[:, k], dist.at(k), draft.drafter, draft.logp[:, k])
        run.count_at(k, int(rows.sum()), int(accepted.sum()))
        unrejected = (unrejected & ~rows) | (accepted & run.active)
    return unrejected


def verify_block(run: QStarRun, draft: Drafted, dist: NextTokenDist) -> Tensor:
    """The longest prefix that joint verification accepts.

    p_i = min(1, p_{i-1} q(x_i)/p(x_i)), p_0 = 1. S_i = Σ (p_i q - p)+ at the position after prefix i. Prefix i is accepted
    with probability h_i = S_i / (S_i + 1 - p_i), the whole draft with h_G = p_G. After prefix i < G the next token is drawn
    from norm((p_i q - p)+).
    """
    drafter, tokens, lengths, proposal = draft
    active, gamma = run.active, tokens.shape[1]
    q, p = dist.log_q.exp(), proposal.exp()
    ratio = (dist.log_q - proposal).gather(-1, tokens.unsqueeze(-1)).squeeze(-1).exp()  # (B, G)
    # 1. the length of the longest accepted prefix
    weight, accepted, residuals = torch.ones_like(ratio[:, 0]), torch.zeros_like(run.lengths), []
    for k in range(gamma + 1):
        if k > 0:
            weight = (weight * ratio[:, k - 1]).clamp(max=1.0)  # p_k
        probability = weight
        if k < gamma:
            residuals.append((weight.unsqueeze(-1) * q[:, k] - p[:, k]).clamp(min=0))
            total = residuals[-1].sum(-1)  # S_k
            within = torch.where(weight < 1, total / (total + 1 - weight).clamp(min=1e-300), 1.0)  # h_k
            probability = torch.where(lengths > k, within, weight)
        if k > 0:
            accepted = torch.where(run.rng.accept(probability.log()) & (lengths >= k), k, accepted)
    # 2. acceptance, of the tokens that a row has room for
    room = torch.minimum(run.remaining, lengths)[active]
    room = torch.minimum(
        room, until_end(tokens, run.rules.eos_ids).sum(-1)[active]
    )  # what is behind the end is no text
    verified = torch.minimum(accepted[active] + 1, room).sum()
    run.count(drafter, int(verified), int(torch.minimum(accepted[active], room).sum()))
    for k in range(gamma):
        run.count_at(k, *(int(((accepted[active] >= n) & (room > k)).sum()) for n in (k, k + 1)))
    # 3. the prefix, then one token from the residual where the draft was not accepted whole
    for k in range(gamma):
        run.commit(active & (accepted > k), tokens[:, k], dist.at(k))
    for k in range(gamma):
        rows = active & (accepted == k) & (lengths > k)
        if bool(rows.any()):
            mass = residuals[k].sum(-1, keepdim=True)
            run.commit(rows, run.rng.choose(torch.where(mass > 0, residuals[k], q[:, k])), dist.at(k))
    return active & (accepted == lengths) & run.active


def verify_shared_noise(run: QStarRun, draft: Drafted, dist: NextTokenDist) -> Tensor:
    """q* is drawn at every position with the noise of that position, and a drafted token is accepted where it is that draw."""
    unrejected = run.active
    for k in range(draft.tokens.shape[1]):
        rows = unrejected & (draft.lengths > k)
        if not bool(rows.any()):
            break
        own = run.draw(dist.log_q[:, k].exp(), 0)
        accepted = (own == draft.tokens[:, k]) & rows
        run.count(draft.drafter, int(rows.sum()), int(accepted.sum()))
        run.count_at(k, int(rows.sum()), int(accepted.sum()))
        run.commit(rows, own, dist.at(k))
        unrejected = (unrejected & ~rows) | (accepted & run.active)
    return unrejected


VERIFICATIONS: dict[Verify, Verification] = {
    "token": verify_tokens,
    "block": verify_block,
    "shared_noise": verify_shared_noise,
}
