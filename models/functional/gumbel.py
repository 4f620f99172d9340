r"""Draws from softmax(logits), and straight-through choices: discrete in the forward pass, relaxed in the gradient.

.. math:: e = e_{hard} + e_{soft} - \mathrm{sg}(e_{soft})

Jang et al. (1611.01144), Maddison et al. (1611.00712). Hard and soft part share one noise: with
another noise, or none, the soft part would have the gradient of a choice that was not made.
Legend: V choices.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Choice(NamedTuple):
    """soft (..., V): relaxed weights that sum to 1; hard (..., V): one-hot at the soft weights' largest."""

    soft: Tensor
    hard: Tensor


def gumbel_noise(like: Tensor, generator: Generator | None) -> Tensor:
    """Standard Gumbel noise of the shape and type of `like`, drawn in float64."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(min=1e-300))).to(like.dtype)


def gumbel_st(logits: Tensor, temperature: float, noise: Tensor) -> Choice:
    """softmax((logits + noise) / temperature) and the one-hot of the same sample: a draw from softmax(logits)."""
    soft = ((logits + noise) / temperature).softmax(-1)
    return Choice(soft, one_hot_argmax(soft))


def one_hot_argmax(scores: Tensor) -> Tensor:
    """1 at the largest score, 0 elsewhere, without a gradient."""
    return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0).detach()


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, with the gradients of both."""
    return hard + (soft - soft.detach())


def sample_categorical(logits: Tensor, temperature: float, generator: Generator | None) -> Tensor:
    """A draw from softmax(logits / temperature); the argmax at temperature 0. (..., V) -> (...).

    In float64: low-precision Gumbel noise is truncated and makes samples too probable (Zheng et al., 2024).
    """
    if temperature == 0:
        return logits.argmax(-1)
    wide = logits.double()
    return (wide / temperature + gumbel_noise(wide, generator)).argmax(-1)
