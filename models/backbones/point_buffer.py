"""Points of one optimiser step, collected over its micro-batches: a codebook is updated once a step.

Legend: N points, d coordinates of a code.
"""

import torch
from torch import Tensor


class PointBuffer:
    """Points by key, such as the level or the slot that their codebook belongs to.

    `add` for every micro-batch, `pop` at the last one of an optimiser step.
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
