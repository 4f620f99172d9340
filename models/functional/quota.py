r"""Means that are held at their targets by multipliers which adapt: the method of multipliers (Hestenes 1969, Powell 1969).

.. math:: \mu (m - q), \qquad \mu \leftarrow \mathrm{clip}(\mu + \eta\,(m - q),\; -\mu_{max},\; \mu_{max})

A penalty of fixed weight c leaves the mean m off its target q: where all other losses together have the slope s in m,
c (m - q)² rests at m = q - s/2c. A multiplier rests at m = q alone, where mu = -s.
Legend: L constraints.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LIMIT = 10.0  # of a multiplier, beside a loss in nats


class QuotaMultipliers:
    """values (L,) float64: one multiplier for each constraint. They have no gradient and are alike on every rank.

    `add` collects the micro-batches of an optimiser step, `apply` moves the multipliers once by those of all ranks. gain: η.
    """

    def __init__(self, constraints: int, gain: float) -> None:
        self.values = torch.zeros(constraints, dtype=torch.float64)
        self.gain = gain
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, excess: Tensor, count: Tensor) -> None:
        """One micro-batch: the sum of (value - target) and the number of values, (L,) each."""
        sums = torch.stack([excess.double(), count.double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def apply(self, gather: Callable[[Tensor], Tensor]) -> None:
        """After the last micro-batch. gather: a tensor of all ranks, (ranks, ...). A constraint without values stays."""
        if self._sums is None:
            return
        excess, count = gather(self._sums).sum(0).cpu()
        self.values = (self.values + self.gain * excess / count.clamp(min=1)).clamp(-LIMIT, LIMIT)
        self._sums = None

    def state(self) -> Tensor:
        """What a checkpoint keeps, (L,)."""
        return self.values.clone()

    def load(self, state: Tensor | None) -> None:
        """None: of a checkpoint without multipliers, which then begin at 0."""
        self.values = torch.zeros_like(self.values) if state is None else state.double().cpu()
