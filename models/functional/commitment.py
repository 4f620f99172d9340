"""How far the relaxed embedding of a choice is from the embedding that was chosen.

Legend: N chosen slots, D width.
"""

import torch.nn.functional as F
from torch import Tensor


def commitment(soft: Tensor, hard: Tensor) -> Tensor:
    """Mean of ||e_soft - sg(e_hard)||² / D over (N, D) (van den Oord et al., 1711.00937); 0 for none.

    The chosen embedding is held: the relaxed one moves, and with it the logits that mixed it.
    """
    return (soft - hard.detach()).square().sum() / max(1, soft.numel())


def relaxation_cosine(soft: Tensor, hard: Tensor) -> Tensor:
    """Mean cosine of relaxed and chosen embeddings (N, D): near 1 where the gradient is that of the choice made."""
    return F.cosine_similarity(soft, hard, dim=-1).sum() / max(1, len(soft))
