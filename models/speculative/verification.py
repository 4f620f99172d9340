"""How much of a draft is kept: token by token (Leviathan et al., 2023) or as a block (Sun et al., 2403.10444).

Rows of a batch may have drafts of different lengths.
Legend: B batch, G tokens of the longest draft, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.speculative.distribution import NextTokenDist
from models.speculative.state import QStarRun


class Drafted(NamedTuple):
    """tokens (B, G), the first `lengths` (B,) of each row drafted by `drafter` from its log-probabilities logp (B, G, V)."""

    drafter: str
    tokens: Tensor
    lengths: Tensor
    logp: Tensor


# (run, the draft, the law at its places) -> rows kept whole (B,) bool; a row without a draft is
Verification = Callable[[QStarRun, Drafted, NextTokenDist], Tensor]


def verify_tokens(run: QStarRun, draft: Drafted, mixture: NextTokenDist) -> Tensor:
    """Each token is kept on its own with min(1, q/p), until one is not."""
    alive = run.active
    for k in range(draft.tokens.shape[1]):
        rows = alive & (draft.lengths > k)
        if not bool(rows.any()):
            break
        kept = run.settle(rows, draft.tokens[:, k], mixture.at(k), draft.drafter, draft.logp[:, k])
        alive = (alive & ~rows) | (kept & run.active)
    return alive


def verify_block(run: QStarRun, draft: Drafted, mixture: NextTokenDist) -> Tensor:
    """The longest prefix that joint verification keeps.

    p_i = min(1, p_{i-1} q(x_i)/p(x_i)); prefix i is kept with h_i = S_i / (S_i + 1 - p_i), S_i = Σ (p_i q - p)+ at the next
    place, and h_G = p_G. After prefix i < G the next token is drawn from norm((p_i q - p)+).
    """
    drafter, drafts, lengths, proposal = draft
    active, gamma = run.active, drafts.shape[1]
    q, p = mixture.log_q.exp(), proposal.exp()
    ratio = (mixture.log_q - proposal).gather(-1, drafts.unsqueeze(-1)).squeeze(-1).exp()  # (B, G)
    weight, best, rest = torch.ones_like(ratio[:, 0]), torch.zeros_like(run.lengths), []
    for k in range(gamma + 1):
        if k > 0:
            weight = (weight * ratio[:, k - 1]).clamp(max=1.0)
        rng = weight
        if k < gamma:
            rest.append((weight.unsqueeze(-1) * q[:, k] - p[:, k]).clamp(min=0))
            total = rest[-1].sum(-1)
            within = torch.where(weight < 1, total / (total + 1 - weight).clamp(min=1e-300), 1.0)
            rng = torch.where(lengths > k, within, weight)
        if k > 0:
            best = torch.where(run.rng.accept(rng.log()) & (lengths >= k), k, best)
    room = torch.minimum(run.most - run.made, lengths)[active]
    run.count(drafter, int(torch.minimum(best[active] + 1, room).sum()), int(torch.minimum(best[active], room).sum()))
    for k in range(gamma):
        run.append(active & (best > k), drafts[:, k], mixture.at(k))
    for k in range(gamma):
        rows = active & (best == k) & (lengths > k)
        if bool(rows.any()):
            mass = rest[k].sum(-1, keepdim=True)
            run.append(rows, run.rng.choose(torch.where(mass > 0, rest[k], q[:, k])), mixture.at(k))
    return active & (best == lengths) & run.active


VERIFICATIONS: dict[str, Verification] = {"token": verify_tokens, "block": verify_block}
