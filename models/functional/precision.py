"""The number type in which probabilities are worked out."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32, float32 and float64 stay: logarithms and sums of half precision lose too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
