r"""Straight-through estimators that give the decision to commit a gradient from the text's loss.

The decision is discrete: without one of these it has no gradient.
Legend: B batch, T positions, M packed concepts, D width.
"""

import torch
from torch import Tensor

from models.functional.gumbel import straight_through

LEAST_NULL = 1e-6  # lower bound of 1 - p, for its logarithm


def mix_slots(commit: Tensor, probability: Tensor, concept: Tensor, token: Tensor) -> Tensor:
    """w z + (1 - w) b with w = g + p - sg(p): z at commits, b at NULLs, and dL/dp = <dL/d slot, z - b> at both.

    commit g (B, T) bool, probability p (B, T); concept z (B, T, D): the last concept at each position, 0 before the first;
    token b (B, T, D): the deep input of a NULL.
    """
    gate = straight_through(commit.to(token.dtype), probability.to(token.dtype)).unsqueeze(-1)
    return gate * concept + (1 - gate) * token


def smooth_concepts(concepts: Tensor, probability: Tensor, before: Tensor | None = None) -> Tensor:
    r"""Exponential smoothing of concepts by their commit probabilities (Hwang et al., 2507.07955).

    .. math:: \bar z_m = p_m z_m + (1 - p_m) \bar z_{m-1}, \qquad \bar z_{-1} = z_0

    concepts (B, M, D), probability (B, M) in (0, 1], before (B, D): the last one of an earlier call. The first concept of
    a document has p = 1. Unlike the other estimators it changes the value wherever p < 1.
    """
    smooth, last = [], concepts[:, 0] if before is None else before
    for m in range(concepts.shape[1]):
        p = probability[:, m].to(concepts.dtype).unsqueeze(-1)
        last = p * concepts[:, m] + (1 - p) * last
        smooth.append(last)
    return torch.stack(smooth, 1)


def concept_visibility(commit: Tensor, probability: Tensor, may: Tensor) -> Tensor:
    """Soft mask of the middle layers, (B, 1, T, T): g_k + p_k - sg(p_k) for k < q, and 1 at k = q.

    commit (B, T) bool, probability (B, T), may (B, T, T) bool: `commits.may_be_seen`.
    """
    gate = straight_through(commit.to(probability.dtype), probability).unsqueeze(1)
    eye = torch.eye(may.shape[-1], dtype=probability.dtype, device=may.device)
    return ((gate * may).tril(-1) + eye).unsqueeze(1)


def visibility(seen: Tensor, probability: Tensor, may: Tensor) -> Tensor:
    """Soft mask of the deep layers: the value of seen (B, 1, T, T) bool, the gradient of `soft_visibility`."""
    soft = soft_visibility(probability, may)
    return straight_through(seen.to(soft.dtype), soft)


def soft_visibility(probability: Tensor, may: Tensor) -> Tensor:
    r"""The probability that q > k attends to k: k commits, or no position from k + 1 to q does.

    .. math:: s_{qk} = p_k + (1 - p_k) \prod_{j=k+1}^{q} (1 - p_j)

    probability (B, T); may (B, T, T) bool: `commits.may_be_seen`; 0 elsewhere, and at k = q. Returns (B, 1, T, T).
    """
    stay = torch.log1p(-probability.clamp(max=1 - LEAST_NULL)).cumsum(1)
    alive = (stay.unsqueeze(2) - stay.unsqueeze(1)).tril().exp()
    own = probability.unsqueeze(1)
    return ((own + (1 - own) * alive).tril(-1) * may).unsqueeze(1)


def keep_null_mass(soft: Tensor, probability: Tensor) -> Tensor:
    """Code weights (B, M, K) that sum to p(commit) (B, M), because NULL is one of the classes and keeps its probability.

    Weights that sum to 1 over the codes alone would give the NULL logit a gradient of exactly 0.
    """
    return soft * probability.to(soft.dtype).unsqueeze(-1)
