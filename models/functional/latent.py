"""Prediction in representation space, with a guard against collapse.

Sources: Assran et al., I-JEPA (2023); Bardes et al., VICReg (2022).
Legend: B batch, T positions, D width, N samples, m positions of a span.
"""

import torch
from torch import Tensor


def next_span_mean(hidden: Tensor, span: int) -> Tensor:
    """Mean of the `span` positions after each, (B, T, D) -> (B, T, D); 0 where fewer than `span` follow."""
    length = hidden.shape[1]
    total = torch.nn.functional.pad(hidden.cumsum(1), (0, 0, 1, 0))  # total[t] = sum of the first t
    out = torch.zeros_like(hidden)
    if length > span:
        out[:, : length - span] = (total[:, span + 1 :] - total[:, 1 : length - span + 1]) / span
    return out


def variance_penalty(z: Tensor, target: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Mean over dimensions of max(0, target - sqrt(Var + eps)): (N, D) -> scalar; 0 once every one is spread enough.

    0 for N < 2, which have no variance.
    """
    if len(z) < 2:
        return z.sum() * 0
    return torch.relu(target - torch.sqrt(z.var(0) + eps)).mean()


def covariance_penalty(z: Tensor) -> Tensor:
    """Sum of squared covariances between different dimensions, over D: (N, D) -> scalar; 0 for N < 2."""
    if len(z) < 2:
        return z.sum() * 0
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[-1]
