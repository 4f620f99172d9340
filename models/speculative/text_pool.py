"""Batches of texts that are drawn once and trained on in turn, with fresh anchors each time."""

from collections.abc import Callable

from torch import Tensor

from models.speculative.block_training import Read

Rows = dict[str, Tensor]


class TextPool:
    """size: batches that are kept; 0 keeps none. keeps_reads: also what the verifiers make of them. halved: see `Read`."""

    def __init__(self, size: int, keeps_reads: bool, halved: bool = False) -> None:
        self.size, self.keeps_reads, self.halved = size, keeps_reads, halved
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
        if not (self.size and self.keeps_reads):
            return make()
        slot = turn % self.size
        if slot not in self._reads:
            self._reads[slot] = make().halved() if self.halved else make()
        return self._reads[slot]

    def state_dict(self) -> dict[int, Rows]:
        """The texts; what the verifiers make of them is read anew after a resume, and is the same."""
        return {slot: {name: column.cpu() for name, column in rows.items()} for slot, rows in self.texts.items()}

    def load_state_dict(self, texts: dict[int, Rows]) -> None:
        self.texts, self._reads = dict(texts), {}
