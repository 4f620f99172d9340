"""Batches of texts that are drawn once and trained on in turn, with fresh anchors each time."""

from collections.abc import Callable

from torch import Tensor

from models.speculative.block_options import PoolKeeps
from models.speculative.block_training import Read

Rows = dict[str, Tensor]


class TextPool:
    """size: batches that are kept; 0 keeps none. keeps: see `BlockDraftOptions.pool_keeps`."""

    def __init__(self, size: int, keeps: PoolKeeps) -> None:
        self.size, self.keeps = size, keeps
        self.texts: dict[int, Rows] = {}
        self._reads: dict[int, Read] = {}

    def rows(self, turn: int, draw: Callable[[], Rows]) -> Rows:
        """The batch of this turn, 0, 1, ...; drawn where it is not here yet."""
        if not self.size:
            return draw()
        slot = turn % self.size
        if slot not in self.texts:
            self.texts[slot] = draw()
        return self.texts[slot]

    def read(self, turn: int, make: Callable[[], Read]) -> Read:
        """What the verifiers make of the batch of this turn."""
        if not self.size or self.keeps == "texts":
            return make()
        slot = turn % self.size
        if slot not in self._reads:
            self._reads[slot] = make().halved() if self.keeps == "half_reads" else make()
        return self._reads[slot]

    def state_dict(self) -> dict[int, Rows]:
        """The texts; what the verifiers make of them is read anew after a resume, and is the same."""
        return {slot: {name: column.cpu() for name, column in rows.items()} for slot, rows in self.texts.items()}

    def load_state_dict(self, texts: dict[int, Rows]) -> None:
        self.texts, self._reads = dict(texts), {}
