"""Negative log-likelihoods of the tokens that count.

Legend: B batch, L length, M chosen positions, V vocabulary.
"""

import torch
from torch import Tensor

from models.functional.bits_per_byte import token_nll


def chosen_nll(chosen_logits: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
    """-log p(ids) in nats at the chosen positions, 0 elsewhere, (B, L); in float32 at least.

    chosen_logits (M, V) are the logits of the M = chosen.sum() positions, in row-major order; ids (B, L), chosen (B, L) bool.
    """
    return at_chosen(chosen, token_nll(chosen_logits, ids[chosen]))


def at_chosen(chosen: Tensor, values: Tensor) -> Tensor:
    """values (M,) where chosen (B, L) bool is true, in row-major order; 0 elsewhere."""
    return torch.zeros(chosen.shape, dtype=values.dtype, device=values.device).masked_scatter(chosen, values)


def all_most_probable(chosen_logits: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
    """(B,) bool: whether every chosen id of a row is the most probable one. Arguments as in `chosen_nll`."""
    missed = torch.zeros_like(chosen).masked_scatter(chosen, chosen_logits.argmax(-1) != ids[chosen])
    return ~missed.any(-1)
