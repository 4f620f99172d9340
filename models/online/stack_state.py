"""What decoding keeps of the rows of a batch, of every level of concepts.

Legend: B batch, D width.
"""

import torch
from torch import nn

from models.online.router import RouterState
from models.online.row_cache import RowCache


class StackState:
    """What a stack has read of B rows.

    A cache for each stage, the router's state, commits so far, the last concept and the mean of the tail behind it.
    """

    def __init__(self, stack: nn.Module, batch: int, device: torch.device) -> None:
        self.shallow, self.deep = RowCache(), RowCache()
        self.middle = RowCache() if stack.inner is None else StackState(stack.inner, batch, device)
        self.router: RouterState = stack.router.start(batch, device)
        self.concepts = torch.zeros(batch, dtype=torch.long, device=device)
        self.last, self.tail = (stack.bridge.weight.new_zeros(batch, len(stack.bridge.weight)) for _ in range(2))

    def caches(self) -> list[RowCache]:
        inner = [self.middle] if isinstance(self.middle, RowCache) else self.middle.caches()
        return [self.shallow, *inner, self.deep]
