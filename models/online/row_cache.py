"""A key-value cache whose rows have lengths of their own: rows of a batch commit, and drop their tails, at different steps.

A row uses its first `lengths[row]` slots. Later slots are free: they are masked, and overwritten by the next positions.
Legend: B rows held, n rows of a step, H key-value heads, S slots, T positions, d head width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

# slots that are added when a buffer is full
CHUNK = 64


class RowCache:
    """Has the role of a transformers cache: layers call `update`. First a whole text, then steps of one position a row."""

    def __init__(self) -> None:
        self.layers: dict[int, list[Tensor]] = {}
        self.lengths = torch.empty(0, dtype=torch.long)
        self._rows: Tensor | None = None

    # -- a whole text -------------------------------------------------------------------------------------------------

    def keep(self, chosen: Tensor) -> None:
        """After a whole text: keep only its positions chosen (B, T) bool, in order."""
        self.lengths = chosen.sum(1)
        order = (~chosen).long().argsort(dim=1, stable=True)[:, : max(1, int(self.lengths.max()))]
        pick = order[:, None, :, None]
        for held in self.layers.values():
            held[:] = [x.gather(2, pick.expand(-1, x.shape[1], -1, x.shape[3])) for x in held]

    # -- one position a row -------------------------------------------------------------------------------------------

    def begin(self, rows: Tensor) -> Tensor | None:
        """Start a step of rows (n,). Returns the mask (n, 1, 1, S) of visible slots, the new one included; None is all."""
        self._rows, self._at = rows, self.lengths[rows]
        self._slots = int(self._at.max()) + 1
        self._all = len(rows) == len(self.lengths)
        if bool((self._at == self._slots - 1).all()):
            return None
        return (torch.arange(self._slots, device=rows.device) <= self._at.unsqueeze(1))[:, None, None]

    def end(self) -> None:
        """End the step: its rows are one position longer."""
        self.lengths[self._rows] += 1
        self._rows = None

    def cut(self, rows: Tensor, lengths: Tensor) -> None:
        """Shorten rows (n,) to lengths (n,)."""
        self.lengths[rows] = lengths

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_args, **_options) -> tuple[Tensor, Tensor]:
        """keys, values (n, H, T, d) of a layer -> those that its queries attend to, the cached ones included."""
        if self._rows is None:
            self.layers[layer_idx] = [keys, values]
            return keys, values
        held = self.layers[layer_idx]
        if (short := self._slots - held[0].shape[2]) > 0:
            held[:] = [torch.cat([x, x.new_zeros(*x.shape[:2], max(short, CHUNK), x.shape[3])], 2) for x in held]
        seen = []
        for whole, new in zip(held, (keys, values), strict=True):
            whole[self._rows, :, self._at] = new[:, :, 0]
            seen.append(whole[:, :, : self._slots] if self._all else whole[self._rows, :, : self._slots])
        return seen[0], seen[1]

    # -- size ---------------------------------------------------------------------------------------------------------

    def bytes(self) -> int:
        """Bytes of the slots in use: of every row its own length."""
        slots = int(self.lengths.sum())
        return sum(slots * x.shape[1] * x.shape[3] * x.element_size() for held in self.layers.values() for x in held)


def held_bytes(caches: Iterable[RowCache]) -> int:
    return sum(cache.bytes() for cache in caches)
