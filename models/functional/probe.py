"""A linear probe in closed form: what can be read off states with one matrix.

Legend: N samples, D width, K classes.
"""

import torch
from torch import Tensor


def fit_ridge(states: Tensor, labels: Tensor, classes: int, ridge: float = 1e-3) -> Tensor:
    """Least squares onto one-hot labels with a penalty `ridge` N |W|²: (N, D), (N,) -> (D + 1, K), the last row an offset.

    In float64 on standardised states, so that the penalty means the same for every network.
    """
    x = _with_offset(states.double())
    penalty = ridge * len(x) * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    penalty[-1, -1] = 0.0
    target = torch.nn.functional.one_hot(labels, classes).double()
    return torch.linalg.solve(x.T @ x + penalty, x.T @ target)


def probe_accuracy(weights: Tensor, states: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest score is their label's."""
    return ((_with_offset(states.double()) @ weights).argmax(-1) == labels).double().mean().item()


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the mean and deviation of the first."""
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    return (train - mean) / deviation, (test - mean) / deviation


def _with_offset(states: Tensor) -> Tensor:
    return torch.cat([states, states.new_ones(len(states), 1)], -1)
