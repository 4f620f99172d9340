"""The random draws of a decoder: from a seeded generator, or an enumeration of all their outcomes."""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Generator, Tensor


class RandomSource(Protocol):
    """The kinds of draws that speculative decoding makes."""

    def choose(self, p: Tensor) -> Tensor:
        """(B, V) probabilities -> (B,) indices."""
        ...

    def accept(self, log_ratio: Tensor) -> Tensor:
        """(B,) -> (B,) bool, each true with probability min(1, exp(log_ratio))."""
        ...

    def uniform(self, rows: int, count: int, like: Tensor) -> Tensor:
        """U(0, 1), (rows, count) float64 on the device of `like`."""
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

    def uniform(self, rows: int, count: int, like: Tensor) -> Tensor:
        return torch.rand(rows, count, generator=self.generator, device=like.device, dtype=torch.float64)


class EnumeratedSource:
    """A `RandomSource` for a batch of one: it follows a script of outcomes and records which others were possible.

    probability: of all outcomes so far together. grid: uniform numbers are the midpoints of so many equal intervals, which is
    exact where every probability that they are compared with is a multiple of 1 / grid.
    """

    def __init__(self, script: list[int], grid: int = 4) -> None:
        self.script, self.probability, self.grid = script, 1.0, grid
        self.draws: list[tuple[int, list[int]]] = []  # the outcome taken, and all that have a probability

    def choose(self, p: Tensor) -> Tensor:
        row = p[0].double()
        return torch.tensor([self._take((row / row.sum()).tolist())], device=p.device)

    def accept(self, log_ratio: Tensor) -> Tensor:
        yes = min(1.0, log_ratio[0].double().exp().item())
        return torch.tensor([self._take([1 - yes, yes]) == 1], device=log_ratio.device)

    def uniform(self, rows: int, count: int, like: Tensor) -> Tensor:
        if rows != 1:
            raise ValueError(f"outcomes are enumerated for one row, not for {rows}")
        taken = [self._take([1 / self.grid] * self.grid) for _ in range(count)]
        return (torch.tensor([taken], dtype=torch.float64, device=like.device) + 0.5) / self.grid

    def _take(self, probabilities: list[float]) -> int:
        possible = [k for k, p in enumerate(probabilities) if p > 0]
        taken = self.script[len(self.draws)] if len(self.draws) < len(self.script) else possible[0]
        self.draws.append((taken, possible))
        self.probability *= probabilities[taken]
        return taken


Result = TypeVar("Result")


def enumerate_outcomes(run: Callable[[RandomSource], Result], grid: int = 4) -> Iterator[tuple[float, Result]]:
    """(probability, result) of `run(source)`, called once for every combination of outcomes of its draws.

    grid: see `EnumeratedSource`.
    """
    script: list[int] = []
    while True:
        source = EnumeratedSource(script, grid)
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
