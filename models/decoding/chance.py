"""Where a decoder's randomness comes from, so that a test can put an enumeration of every outcome in its place."""

from typing import Protocol

import torch
from torch import Generator, Tensor


class Chance(Protocol):
    """Two kinds of draws are all that speculative decoding needs."""

    def choose(self, p: Tensor) -> Tensor:
        """(B, V) probabilities -> (B,) indices."""
        ...

    def accept(self, log_ratio: Tensor) -> Tensor:
        """(B,) -> (B,) bool, each true with probability min(1, exp(log_ratio))."""
        ...


class TorchChance:
    """Draws of a seeded generator, in float64."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def choose(self, p: Tensor) -> Tensor:
        return torch.multinomial(p.double(), 1, generator=self.generator).squeeze(-1)

    def accept(self, log_ratio: Tensor) -> Tensor:
        u = torch.rand(log_ratio.shape, generator=self.generator, device=log_ratio.device, dtype=torch.float64)
        return u.log() < log_ratio
