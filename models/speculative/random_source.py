"""The random draws of a decoder: from a seeded generator, or an enumeration of all their outcomes."""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Generator, Tensor


class RandomSource(Protocol):
    """The two kinds of draws that speculative decoding makes."""

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


class EnumeratedSource:
    """A `RandomSource` for a batch of one: it follows a script of outcomes and records which others were possible.

    probability: of all outcomes so far together.
    """

    def __init__(self, script: list[int]) -> None:
        self.script, self.probability = script, 1.0
        self.draws: list[tuple[int, list[int]]] = []  # the outcome taken, and all that have a probability

    def choose(self, p: Tensor) -> Tensor:
        row = p[0].double()
        return torch.tensor([self._take((row / row.sum()).tolist())], device=p.device)

    def accept(self, log_ratio: Tensor) -> Tensor:
        yes = min(1.0, log_ratio[0].double().exp().item())
        return torch.tensor([self._take([1 - yes, yes]) == 1], device=log_ratio.device)

    def _take(self, probabilities: list[float]) -> int:
        possible = [k for k, p in enumerate(probabilities) if p > 0]
        taken = self.script[len(self.draws)] if len(self.draws) < len(self.script) else possible[0]
        self.draws.append((taken, possible))
        self.probability *= probabilities[taken]
        return taken


Result = TypeVar("Result")


def enumerate_outcomes(run: Callable[[RandomSource], Result]) -> Iterator[tuple[float, Result]]:
    """(probability, result) of `run(source)`, called once for every combination of outcomes of its draws."""
    script: list[int] = []
    while True:
        source = EnumeratedSource(script)
        result = run(source)
        yield source.probability, result
        # the next script: the last draw that has a further outcome takes it, as an odometer counts
        draws = source.draws
        while draws and draws[-1][0] == draws[-1][1][-1]:
            draws = draws[:-1]
        if not draws:
            return
        taken, possible = draws[-1]
        script = [k for k, _ in draws[:-1]] + [possible[possible.index(taken) + 1]]
