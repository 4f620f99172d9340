r"""Annealing that waits for the loss: progress goes on only while a gap is within a tolerance.

.. math:: g = \overline{\ell - \ell_0} + \overline{\ell_0} - \min_{s \le t} \overline{\ell_0}(s), \qquad
    p \leftarrow \min(1,\; p + r\,[g \le \epsilon])

ℓ: the loss at the present setting; ℓ_0: that of a reference on the same batch, nats a token; a bar: the running mean, without
bias towards 0; ε: the tolerance; r: the progress of a step. The difference of one batch has little noise. A reference that
gets worse while nothing trains it counts as a gap, too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MEMORY = 0.9  # of the running means


class PacedAnnealing:
    """progress: 0 at the start, 1 at the end; alike on every rank. tolerance: ε, nats a token.

    `add` collects losses over the micro-batches of an optimiser step, `apply` moves the progress once. Without any it stays.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.progress = 0.0
        self._gap, self._reference, self._weight, self._best = 0.0, 0.0, 0.0, float("inf")
        self._sums: Tensor | None = None

    @property
    def reference(self) -> float:
        """The running mean of ℓ_0; 0 before the first measurement."""
        return self._reference / self._weight if self._weight else 0.0

    @property
    def gap(self) -> float:
        """g; 0 before the first measurement."""
        return self._gap / self._weight + self.reference - self._best if self._weight else 0.0

    @torch.no_grad()
    def add(self, nll: Tensor, reference: Tensor, tokens: Tensor) -> None:
        """One micro-batch: sums of both losses over its tokens, and their number."""
        sums = torch.stack([(nll - reference).double(), reference.double(), tokens.double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def apply(self, step: float, gather: Callable[[Tensor], Tensor]) -> None:
        """After the last micro-batch. step: r. gather: a tensor of all ranks, (ranks, ...)."""
        if self._sums is not None:
            gap, reference, tokens = gather(self._sums).sum(0).tolist()
            new = (1 - MEMORY) / max(1.0, tokens)
            self._gap = MEMORY * self._gap + new * gap
            self._reference = MEMORY * self._reference + new * reference
            self._weight = MEMORY * self._weight + (1 - MEMORY)
            self._best = min(self._best, self.reference)
            self._sums = None
        if self._weight and self.gap <= self.tolerance:
            self.progress = min(1.0, self.progress + step)

    def state(self) -> Tensor:
        """What a checkpoint keeps, (5,) float64."""
        return torch.tensor([self.progress, self._gap, self._reference, self._weight, self._best], dtype=torch.float64)

    def load(self, state: Tensor | None) -> None:
        """None: of a checkpoint without it, which then begins at 0."""
        start: list[float] = [0.0, 0.0, 0.0, 0.0, float("inf")] if state is None else state.tolist()
        self.progress, self._gap, self._reference, self._weight, self._best = start
