"""Newton–Schulz iteration: a matrix' nearest orthogonal one by products alone, what Muon's steps are made of.

Legend: N matrices, R rows, C columns.
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
"""

import torch
from torch import Tensor

STEPS = 5
# steepest at 0, so that small singular values rise soonest; the others are left between .68 and 1.14 instead of at 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ: (N, R, C) -> (N, R, C), in the matrices' precision; of a matrix of zeros, zeros.

    Each step makes a s + b s³ + c s⁵ of every singular value s, which lie in [0, 1] at first.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
