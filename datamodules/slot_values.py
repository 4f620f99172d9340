"""Slots of dictionary prompts as numbers: a known plan of real texts."""

from collections.abc import Sequence

import torch
from torch import Tensor


def slot_values(slots: Sequence[dict[str, str] | None]) -> tuple[list[str], Tensor] | None:
    """Names of all slots (A) and, for each row, the number of its value (N, A), 0 where it has none.

    None where some prompt was no dictionary: nothing is known of its text then.
    """
    if not slots or any(row is None for row in slots):
        return None
    names = sorted({name for row in slots for name in row})
    numbers: list[dict[str, int]] = [{} for _ in names]
    table = torch.zeros(len(slots), len(names), dtype=torch.long)
    for n, row in enumerate(slots):
        for a, name in enumerate(names):
            if name in row:
                table[n, a] = numbers[a].setdefault(row[name], 1 + len(numbers[a]))
    return names, table
