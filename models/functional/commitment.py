"""Distance between the relaxed embedding of a choice and the chosen embedding.

Legend: N chosen slots, D width.
"""

import torch.nn.functional as F
from torch import Tensor


def commitment(soft: Tensor, hard: Tensor) -> Tensor:
    """Mean of ||e_soft - sg(e_hard)||² / D over (N, D) (van den Oord et al., 1711.00937); 0 for none.

    The chosen embedding is a constant: the gradient moves the relaxed one and the logits that mixed it.
    """
    return (soft - hard.detach()).square().sum() / max(1, soft.numel())


def relaxation_cosine(soft: Tensor, hard: Tensor) -> Tensor:
    """Mean cosine of relaxed and chosen embeddings (N, D): near 1 where the relaxed choice is close to the chosen one."""
    return F.cosine_similarity(soft, hard, dim=-1).sum() / max(1, len(soft))
