"""Slots of dictionary prompts as numbers: a known plan of real texts."""

from collections.abc import Sequence

import torch
from torch import Tensor

Numbers = dict[str, dict[str, int]]  # of each slot, in the order of their names, the number of each value


def slot_numbers(slots: Sequence[dict[str, str] | None]) -> Numbers | None:
    """The values of each slot, numbered from 1 as they come; None where some prompt was no dictionary."""
    if not slots or any(row is None for row in slots):
        return None
    numbers: Numbers = {name: {} for name in sorted({name for row in slots for name in row})}
    for row in slots:
        for name, value in row.items():
            numbers[name].setdefault(value, 1 + len(numbers[name]))
    return numbers


def slot_values(
    slots: Sequence[dict[str, str] | None], numbers: Numbers | None = None
) -> tuple[list[str], Tensor] | None:
    """Names of all slots (A) and, for each row, the number of its value (N, A), 0 where it has none that is numbered.

    numbers: None numbers the values of these rows. None where some prompt was no dictionary: nothing is known of its text then.
    """
    numbers = slot_numbers(slots) if numbers is None else numbers
    if numbers is None or any(row is None for row in slots):
        return None
    table = torch.zeros(len(slots), len(numbers), dtype=torch.long)
    for n, row in enumerate(slots):
        for a, (name, known) in enumerate(numbers.items()):
            table[n, a] = known.get(row.get(name), 0)
    return list(numbers), table
