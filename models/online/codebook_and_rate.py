"""What no gradient moves: offsets that hold the routers' rates, and codes that follow their points. The same on every rank.

Legend: B batch, T positions, M packed concepts, d coordinates of a code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.online.concept_stack import Level
from models.online.model import OnlineConceptModel

# ends of names: no gradient trains these buffers, and no other file has them
KEPT = ("router.offset", "codes.space.codes", "codes.space.counts", "codes.space.sums")


class OnlineUpkeep:
    """A mixin of the module."""

    model: OnlineConceptModel
    code_decay: float

    def _hold_rates(self, levels: list[Level]) -> None:
        """Keep the realised rates of commits at 1 / compression."""
        for stack, level in zip(self.model.stacks(), levels, strict=True):
            routing = level.routing
            sums = torch.cat(
                [torch.stack([routing.commit.sum(), routing.valid.sum()]).double(), routing.moments.double()]
            )
            sums = self.gathered(sums).sum(0)
            if sums[1] > 0:  # there may be no concepts for concepts of concepts
                stack.router.hold(sums[0] / sums[1], routing.compression, sums[2:])

    def _move_codes(self, levels: list[Level], most: int) -> None:
        """Codes follow their points; at the first step they start at the points' centres. most: T, more than a row has."""
        for k, (stack, level) in enumerate(zip(self.model.stacks(), levels, strict=True)):
            if level.coded.points is None:
                continue
            points = self._of_all_ranks(level.coded.points, level.real, most)
            if not len(points):
                continue
            generator, space = self.generator_of_all_ranks(), stack.codes.space
            if self.global_step == 0:
                space.begin(points, generator)
            dead = space.follow(points, self.code_decay, generator)
            self.log(f"monitor/dead_codes{f'_{k + 1}' if k else ''}", float(dead))

    def _of_all_ranks(self, points: Tensor, real: Tensor, most: int) -> Tensor:
        """points (B, M, d) of real (B, M) concepts -> (N, d), in the order of the rows, whatever the number of ranks."""
        missing = most - points.shape[1]
        points, real = F.pad(points, (0, 0, 0, missing)), F.pad(real, (0, missing))
        points, real = map(self.in_row_order, (points, real))
        return points[real]

    def _buffers_kept(self) -> set[str]:
        """The setting, the routers' offsets and the places of codes."""
        return {name for name, _ in self.named_buffers() if name == "model.setting" or name.endswith(KEPT)}
