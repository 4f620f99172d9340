"""Points of one optimiser step, collected over its micro-batches: a codebook is updated once a step.

Legend: N points, d coordinates of a code.
"""

import torch
from torch import Tensor


class PointBuffer:
    """Points by key, such as the level or the slot that their codebook belongs to.

    `add` in `training_step`, `pop` in `on_before_optimizer_step`. Lightning calls the second once an optimiser step, after
    the last of its micro-batches; also where an epoch ends before `accumulate_grad_batches` of them were read.
    """

    def __init__(self) -> None:
        self._points: dict[int, list[Tensor]] = {}

    def add(self, key: int, points: Tensor) -> None:
        """The points (N, d) of one micro-batch."""
        self._points.setdefault(key, []).append(points.detach())

    def pop(self) -> dict[int, Tensor]:
        """All points (N, d) since the last call, in the order in which they were added; the buffer is then empty."""
        points = {key: torch.cat(parts) for key, parts in self._points.items()}
        self._points = {}
        return points
