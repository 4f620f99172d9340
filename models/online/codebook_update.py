"""The running-mean update of codebooks (`module.sampler=ema_vq`): no gradient moves these codes.

Legend: B batch, T positions, M packed concepts, N points, d coordinates of a code.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Generator, Tensor

from models.backbones.code_space import CodeSpace
from models.backbones.point_buffer import PointBuffer
from models.online.concept_stack import Level


class CodebookUpdate:
    """Collects the points of every level over the micro-batches of an optimiser step, then moves each codebook once.

    decay: weight of the past in the running means.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._points = PointBuffer()

    def add(self, levels: Sequence[Level], length: int, in_row_order: Callable[[Tensor], Tensor]) -> None:
        """The points of one micro-batch. length: T, at least the M of every rank.

        in_row_order: (B, ...) of all ranks -> (ranks * B, ...), so that codes do not depend on the number of ranks.
        """
        for k, level in enumerate(levels):
            points, real = level.coded.points, level.real
            if points is None:
                continue
            missing = length - points.shape[1]  # ranks pack different numbers of concepts
            points, real = F.pad(points, (0, 0, 0, missing)), F.pad(real, (0, missing))
            self._points.add(k, in_row_order(points)[in_row_order(real)])

    def apply(self, spaces: Sequence[CodeSpace], generator: Callable[[], Generator], *, start: bool) -> dict[int, int]:
        """Move every level's codes to its points. Returns how many unused codes of each level were replaced.

        generator: returns a fresh generator, the same on every rank. start: place the codes at k-means centres first.
        """
        replaced = {}
        for k, points in self._points.pop().items():
            if not len(points):  # a level of concepts of concepts may have none
                continue
            source = generator()
            if start:
                spaces[k].begin(points, source)
            replaced[k] = spaces[k].follow(points, self.decay, source)
        return replaced
