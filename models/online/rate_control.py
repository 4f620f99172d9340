"""Control of the rate of commits, once an optimiser step: of the routers' offsets, or of the weight of a loss."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.functional.quota import QuotaMultipliers
from models.online.concept_stack import Level
from models.online.router import Router


class RateController:
    """Holds the realised rate of commits at 1 / compression.

    `add` counts commits over the micro-batches of an optimiser step, `apply` corrects the offsets by the counts of all ranks.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._compression = 1.0

    @torch.no_grad()
    def add(self, levels: Sequence[Level]) -> None:
        """Count one micro-batch: commits, positions, and the moments of the scores, of every level."""
        routings = [level.routing for level in levels]
        counts = [torch.stack([r.commit.sum(), r.valid.sum()]).double() for r in routings]
        sums = torch.stack([torch.cat([count, r.moments.double()]) for count, r in zip(counts, routings, strict=True)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._compression = routings[0].compression

    def apply(self, routers: Sequence[Router], gather: Callable[[Tensor], Tensor]) -> None:
        """Correct the offset of every level's router. gather: a tensor of all ranks, (ranks, ...)."""
        if self._sums is None:
            return
        for router, sums in zip(routers, gather(self._sums).sum(0), strict=True):
            commits, positions, moments = sums[0], sums[1], sums[2:]
            if positions > 0:  # a level of concepts of concepts may have none
                router.correct_offset(commits / positions, self._compression, moments)
        self._sums = None


class RateMultipliers(QuotaMultipliers):
    """Trains learned routers to commit one position in `compression`: one multiplier for each level.

    The loss has the gradient of the mean commit probability. Its weight is the multiplier and, as a damping, PENALTY times the
    excess of this batch. The multiplier moves by the realised rate, forced commits included, so that it rests where that is
    the wanted one.
    """

    GAIN, PENALTY = 0.02, 4.0

    def __init__(self, levels: int) -> None:
        super().__init__(levels, self.GAIN)

    def add_levels(self, levels: Sequence[Level]) -> None:
        """Count one micro-batch: commits above the wanted ones, and positions."""
        routings = [level.routing for level in levels]
        excess = [r.commit.sum().double() - r.valid.sum().double() / r.compression for r in routings]
        self.add(torch.stack(excess), torch.stack([r.valid.sum() for r in routings]))

    def loss(self, levels: Sequence[Level]) -> Tensor:
        """Sum over levels of weight * (mean commit probability - 1 / compression)."""
        total = levels[0].hidden.new_zeros(())
        for value, r in zip(self.values.tolist(), (level.routing for level in levels), strict=True):
            mean = (r.probability * r.valid).sum() / r.valid.sum().clamp(min=1)
            weight = value + self.PENALTY * (r.realised - 1 / r.compression)
            total = total + weight * (mean - 1 / r.compression)
        return total
