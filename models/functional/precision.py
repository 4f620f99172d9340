"""The number type in which probabilities and derivatives are computed."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32, float32 and float64 stay: logarithms and sums of half precision lose too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which operations keep their inputs' precision, whatever the trainer's mixed precision is."""
    return torch.autocast(x.device.type, enabled=False)


def to_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type of the trainer's mixed precision, unchanged where there is none."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
