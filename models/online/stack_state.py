"""State of incremental forward passes: caches and router states of the rows of a batch, for every level of concepts.

Legend: B batch, D width.
"""

from typing import Any, final

import torch
from torch import nn

from models.online.router import RouterState
from models.online.row_cache import RowCache


@final
class StackState:
    """State of one `ConceptStack` and B rows.

    dtype: of hidden states.
    shallow, middle, deep: key-value caches; middle is a `StackState` where concepts have concepts. rest: of every position in
    the other layers, empty unless the router reads the whole model's states. router: its state.
    concepts (B,): their number so far; last (B, D): the last concept; tail (B, D): mean hidden state of the tail.
    """

    def __init__(self, stack: nn.Module, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shallow, self.deep, self.rest = RowCache(), RowCache(), RowCache()
        self.middle: Any = RowCache() if stack.inner is None else StackState(stack.inner, batch, device, dtype)
        self.router: RouterState = stack.router.start(batch, device, dtype)
        self.concepts = torch.zeros(batch, dtype=torch.long, device=device)
        self.last, self.tail = (
            torch.zeros(batch, len(stack.bridge.weight), device=device, dtype=dtype) for _ in range(2)
        )

    def caches(self) -> list[RowCache]:
        inner = [self.middle] if isinstance(self.middle, RowCache) else self.middle.caches()
        return [self.shallow, *inner, self.deep, *([self.rest] if self.rest.layers else [])]
