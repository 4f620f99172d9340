"""The exact likelihood of texts under q*, which is normalised at every token.

Legend: B batch, T positions, M scored positions, V vocabulary.
"""

import torch
from torch import Tensor, nn

from models.backbones.causal_lm import causal_logits
from models.functional.next_token import CausalText
from models.functional.precision import at_least_float32
from models.speculative.distribution import MixtureDist


@torch.no_grad()
def qstar_log_probabilities(
    theta: nn.Module, target: nn.Module, mixture: MixtureDist, text: CausalText, vocab_size: int
) -> Tensor:
    """log q* (M, V) of the token after each scored position; ids from vocab_size on have no probability and no column."""
    log_p = [
        mixture.tempered(at_least_float32(causal_logits(model, text)[text.weights][:, :vocab_size]).log_softmax(-1))
        for model in (theta, target)
    ]
    return mixture(*log_p).log_q
