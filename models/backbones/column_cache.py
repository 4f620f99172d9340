"""Keys and values of the columns of a row, of which a forward pass computes some anew.

Legend: B batch, H_kv key-value heads, Q columns of a pass, K columns in all, d head width.
"""

import torch
from torch import Tensor


class ColumnCache:
    """What every layer keeps of a row. The columns of a pass take the place of those that were kept there; others stay.

    first: the column that the next pass begins with.
    """

    def __init__(self) -> None:
        self.first = 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def beginning_at(self, first: int) -> "ColumnCache":
        """The same cache, for a pass over consecutive columns that begin with `first`."""
        self.first = first
        return self

    @torch.compiler.disable
    def put(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns, (B, H_kv, K, d), with those of the pass, (B, H_kv, Q, d), in their place."""
        if layer in self._kept:
            keys, values = (self._replaced(*parts) for parts in zip(self._kept[layer], (keys, values), strict=True))
        self._kept[layer] = keys, values
        return keys, values

    def _replaced(self, kept: Tensor, new: Tensor) -> Tensor:
        return torch.cat([kept[:, :, : self.first], new, kept[:, :, self.first + new.shape[2] :]], 2)
