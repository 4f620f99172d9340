"""Where a decoder's randomness comes from: a seeded generator, or an enumeration of every way that its draws can fall."""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Generator, Tensor


class RandomSource(Protocol):
    """Two kinds of draws are all that speculative decoding needs."""

    def choose(self, p: Tensor) -> Tensor:
        """(B, V) probabilities -> (B,) indices."""
        ...

    def accept(self, log_ratio: Tensor) -> Tensor:
        """(B,) -> (B,) bool, each true with probability min(1, exp(log_ratio))."""
        ...


class TorchRandomSource:
    """Draws of a seeded generator, in float64."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def choose(self, p: Tensor) -> Tensor:
        return torch.multinomial(p.double(), 1, generator=self.generator).squeeze(-1)

    def accept(self, log_ratio: Tensor) -> Tensor:
        u = torch.rand(log_ratio.shape, generator=self.generator, device=log_ratio.device, dtype=torch.float64)
        return u.log() < log_ratio


class EnumeratedChance:
    """A `RandomSource` for one row that follows a script of outcomes and notes what else could have happened."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.probability = script, 1.0
        self.made: list[tuple[int, list[int]]] = []  # the outcome taken, and all that have a probability

    def choose(self, p: Tensor) -> Tensor:
        row = p[0].double()
        return torch.tensor([self._take((row / row.sum()).tolist())], device=p.device)

    def accept(self, log_ratio: Tensor) -> Tensor:
        rng = min(1.0, log_ratio[0].double().exp().item())
        return torch.tensor([self._take([1 - rng, rng]) == 1], device=log_ratio.device)

    def _take(self, chances: list[float]) -> int:
        possible = [k for k, rng in enumerate(chances) if rng > 0]
        taken = self.script[len(self.made)] if len(self.made) < len(self.script) else possible[0]
        self.made.append((taken, possible))
        self.probability *= chances[taken]
        return taken


Result = TypeVar("Result")


def enumerate_outcomes(run: Callable[[RandomSource], Result]) -> Iterator[tuple[float, Result]]:
    """(probability, result) of `run(chance)` for every way that its draws can fall: the code that samples, run once each."""
    script: list[int] = []
    while True:
        rng = EnumeratedChance(script)
        result = run(rng)
        yield rng.probability, result
        made = rng.made
        while made and made[-1][0] == made[-1][1][-1]:
            made = made[:-1]
        if not made:
            return
        taken, possible = made[-1]
        script = [k for k, _ in made[:-1]] + [possible[possible.index(taken) + 1]]
