"""Negative log-likelihoods of tokens, and what is read off their sums.

Legend: B batch, L length, M chosen positions, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def chosen_nll(chosen_logits: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
    """-log p(ids) in nats at the chosen positions, 0 elsewhere, (B, L); in float32 at least.

    chosen_logits (M, V) are the logits of the M = chosen.sum() positions, in row-major order; ids (B, L), chosen (B, L) bool.
    """
    wide = chosen_logits if chosen_logits.dtype == torch.float64 else chosen_logits.float()
    nll = F.cross_entropy(wide, ids[chosen], reduction="none")
    return torch.zeros(chosen.shape, dtype=nll.dtype, device=nll.device).masked_scatter(chosen, nll)


def perplexity(nats: float, tokens: float) -> float:
    """exp of the mean nats a token."""
    return math.exp(nats / tokens)


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Nats of text tokens over the bytes that they stand for, in bits: the figure that compares across tokenizers."""
    return nats / (math.log(2) * text_bytes)
