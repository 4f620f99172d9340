"""How much of a draft is kept: token by token (Leviathan et al., 2023) or as a block (Sun et al., 2403.10444).

Legend: B batch, G drafted tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.decoding.qstar_law import PlaceLaw
from models.decoding.qstar_run import QStarRun

# (run, drafts (B, G), law at their places, drafter's name, its log-probabilities (B, G, V)) -> rows kept whole (B,) bool
Verification = Callable[[QStarRun, Tensor, PlaceLaw, str, Tensor], Tensor]


def verify_tokens(run: QStarRun, drafts: Tensor, law: PlaceLaw, drafter: str, proposal: Tensor) -> Tensor:
    """Each token is kept on its own with min(1, q/p), until one is not."""
    alive = run.active
    for k in range(drafts.shape[1]):
        if not bool(alive.any()):
            break
        alive = run.settle(alive, drafts[:, k], law.at(k), drafter, proposal[:, k]) & run.active
    return alive


def verify_block(run: QStarRun, drafts: Tensor, law: PlaceLaw, drafter: str, proposal: Tensor) -> Tensor:
    """The longest prefix that joint verification keeps.

    p_i = min(1, p_{i-1} q(x_i)/p(x_i)); prefix i is kept with h_i = S_i / (S_i + 1 - p_i), S_i = Σ (p_i q - p)+ at the next
    place, and h_G = p_G. After prefix i < G the next token is drawn from norm((p_i q - p)+).
    """
    active, gamma = run.active, drafts.shape[1]
    q, p = law.log_q.exp(), proposal.exp()
    ratio = (law.log_q - proposal).gather(-1, drafts.unsqueeze(-1)).squeeze(-1).exp()  # (B, G)
    weight, best, rest = torch.ones_like(ratio[:, 0]), torch.zeros_like(run.lengths), []
    for k in range(gamma + 1):
        if k > 0:
            weight = (weight * ratio[:, k - 1]).clamp(max=1.0)
        if k == gamma:
            chance = weight
        else:
            rest.append((weight.unsqueeze(-1) * q[:, k] - p[:, k]).clamp(min=0))
            total = rest[-1].sum(-1)
            chance = torch.where(weight < 1, total / (total + 1 - weight).clamp(min=1e-300), 1.0)
        if k > 0:
            best = torch.where(run.chance.accept(chance.log()), k, best)
    room = (run.most - run.made)[active].clamp(max=gamma)
    run.count(drafter, int(torch.minimum(best[active] + 1, room).sum()), int(torch.minimum(best[active], room).sum()))
    for k in range(gamma):
        run.append(active & (best > k), drafts[:, k], law.at(k))
    for k in range(gamma):
        rows = active & (best == k)
        if bool(rows.any()):
            mass = rest[k].sum(-1, keepdim=True)
            run.append(rows, run.chance.choose(torch.where(mass > 0, rest[k], q[:, k])), law.at(k))
    return active & (best == gamma) & run.active


VERIFICATIONS: dict[str, Verification] = {"token": verify_tokens, "block": verify_block}
