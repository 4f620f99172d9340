r"""Annealing that waits for the loss: progress goes on only while a gap is within a tolerance.

.. math:: g \leftarrow \beta g + (1 - \beta)\,\hat g, \qquad p \leftarrow \min(1,\; p + r\,[g \le \epsilon])

ĝ: the loss at the present setting less a reference's on the same batch, nats a token; ε: the tolerance; r: the progress of a
step. The mean over steps starts without bias towards 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MEMORY = 0.9  # β


class PacedAnnealing:
    """progress: 0 at the start, 1 at the end; alike on every rank. tolerance: ε, nats a token.

    `add` collects gaps over the micro-batches of an optimiser step, `apply` moves the progress once. Without a gap it stays.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance, self.progress = tolerance, 0.0
        self._mean, self._weight = 0.0, 0.0
        self._sums: Tensor | None = None

    @property
    def gap(self) -> float:
        """g; 0 before the first measurement."""
        return self._mean / self._weight if self._weight else 0.0

    @torch.no_grad()
    def add(self, gap: Tensor, tokens: Tensor) -> None:
        """One micro-batch: the sum of the gap over its tokens, and their number."""
        sums = torch.stack([gap.double(), tokens.double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def apply(self, step: float, gather: Callable[[Tensor], Tensor]) -> None:
        """After the last micro-batch. step: r. gather: a tensor of all ranks, (ranks, ...)."""
        if self._sums is not None:
            gap, tokens = gather(self._sums).sum(0).tolist()
            self._mean = MEMORY * self._mean + (1 - MEMORY) * gap / max(1.0, tokens)
            self._weight = MEMORY * self._weight + (1 - MEMORY)
            self._sums = None
        if self._weight and self.gap <= self.tolerance:
            self.progress = min(1.0, self.progress + step)

    def state(self) -> Tensor:
        """What a checkpoint keeps, (3,) float64."""
        return torch.tensor([self.progress, self._mean, self._weight], dtype=torch.float64)

    def load(self, state: Tensor | None) -> None:
        """None: of a checkpoint without it, which then begins at 0."""
        self.progress, self._mean, self._weight = (0.0, 0.0, 0.0) if state is None else state.tolist()
