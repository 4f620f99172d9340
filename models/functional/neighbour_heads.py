r"""Attention heads that look at the token before or after from the first step on.

A causal model reads the last token at the position that predicts the next one. A masked position has no token, so even its
neighbours are seen through attention alone. A head that attends to one fixed offset needs a part of the key that all tokens
share. Without it, with rotary positions q R_{i-j} k, it has to grow in every token's embedding, rare ones last. Biases are
that part:

.. math:: s(i, j) = \frac{1}{\sqrt d} b_q^\top R_{j-i}\, b_k = a \sum_{f < F} \cos(\omega_f (j - i - \delta))

has its highest value where j = i + δ. They train like any other weight. d head width, ω_f rotations in radians per position.
"""

import math

import torch
from torch import Tensor

SHARPNESS = 6.0  # a: the neighbour's score is some four nats above that of the positions beside it
ROTATIONS = 3  # F: the fastest ones; slower rotations hardly tell neighbours apart


def offset_of_head(head: int) -> int:
    """-1, 1, -2, 2, ...: the token before, the one after, and so on."""
    return (head // 2 + 1) * (-1 if head % 2 == 0 else 1)


def neighbour_biases(frequencies: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """b_q and b_k, (d,) each, of a head that attends `offset` positions later.

    frequencies (d/2,): ω, fastest first; numbers f and f + d/2 of a head are rotated together, as in transformers' Llama.
    """
    width = 2 * len(frequencies)
    fastest = torch.arange(len(frequencies), device=frequencies.device) < ROTATIONS
    size = math.sqrt(SHARPNESS * math.sqrt(width)) * fastest
    angle = -offset * frequencies
    query = torch.cat([size, torch.zeros_like(size)])
    key = torch.cat([size * angle.cos(), size * angle.sin()])
    return query, key
