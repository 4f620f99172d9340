"""Uniform random numbers for choices."""

import torch
from torch import Generator, Tensor


def uniform(*shape: int, generator: Generator) -> Tensor:
    """U(0, 1) in float32 on the generator's device, whatever the default type is.

    With trainer.precision=bf16-true the default type is bfloat16. Some releases of torch then draw multiples of 1/256 only:
    a probability of 0.001 would become 0.004, and an order by random numbers would have ties.
    """
    return torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float32)
