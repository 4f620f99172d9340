"""Control of the rate of commits: after every optimiser step each router's offset is corrected once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
