r"""How the decision to commit gets a gradient from the text's loss: straight-through forms.

Under e = e_hard + e_soft - sg(e_soft) a gate that only chooses gets none.
Legend: B batch, T positions, M packed concepts, D width.
"""

import torch
from torch import Tensor

from models.functional.gumbel import straight_through


def mix_slots(commit: Tensor, probability: Tensor, concept: Tensor, token: Tensor) -> Tensor:
    """w z + (1 - w) b with w = g + p - sg(p): z at commits, b elsewhere, and dL/dp = <dL/d slot, z - b> everywhere.

    commit (B, T) bool, probability (B, T); concept (B, T, D): the last concept at each position, 0 before the first;
    token (B, T, D).
    """
    gate = straight_through(commit.to(token.dtype), probability.to(token.dtype)).unsqueeze(-1)
    return gate * concept + (1 - gate) * token


def smooth_concepts(concepts: Tensor, probability: Tensor, before: Tensor | None = None) -> Tensor:
    r"""Each concept mixed with those before it by how sure its commit was (Hwang et al., 2507.07955).

    .. math:: \bar z_m = p_m z_m + (1 - p_m) \bar z_{m-1}, \qquad \bar z_{-1} = z_0

    concepts (B, M, D), probability (B, M) in (0, 1], before (B, D): the last one of an earlier call. Unlike the other
    forms it changes the value wherever p < 1.
    """
    smooth, last = [], concepts[:, 0] if before is None else before
    for m in range(concepts.shape[1]):
        p = probability[:, m].to(concepts.dtype).unsqueeze(-1)
        last = p * concepts[:, m] + (1 - p) * last
        smooth.append(last)
    return torch.stack(smooth, 1)


def keep_null_mass(soft: Tensor, probability: Tensor) -> Tensor:
    """Code weights (B, M, K) that sum to p(commit) (B, M): NULL is one of the choices and keeps its share.

    Renormalised over the codes alone, the gradient to the NULL logit would be exactly 0.
    """
    return soft * probability.to(soft.dtype).unsqueeze(-1)
