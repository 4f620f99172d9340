"""Likelihoods of texts under a model and, exactly, under q*, which is normalised at every token.

Legend: B batch, T positions, M scored positions, V vocabulary.
"""

import torch
from torch import Tensor, nn

from models.backbones.causal_lm import causal_logits
from models.functional.next_token import CausalText
from models.functional.precision import at_least_float32
from models.speculative.distribution import MixtureDist


def next_token_log_probs(model: nn.Module, text: CausalText, vocab_size: int) -> Tensor:
    """log p (M, V) of the token after each scored position; ids from vocab_size on have no probability and no column."""
    return log_probs_below(causal_logits(model, text)[text.weights], vocab_size)


def log_probs_below(logits: Tensor, vocab_size: int) -> Tensor:
    """log p (..., vocab_size), at least float32, of the ids below vocab_size alone, from logits (..., V)."""
    return at_least_float32(logits[..., :vocab_size]).log_softmax(-1)


@torch.no_grad()
def qstar_log_probabilities(
    theta: nn.Module, target: nn.Module, mixture: MixtureDist, text: CausalText, vocab_size: int
) -> Tensor:
    """log q* (M, V) of the same tokens."""
    return mixture(*(mixture.tempered(next_token_log_probs(m, text, vocab_size)) for m in (theta, target))).log_q
