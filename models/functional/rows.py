"""Rows of prompt and response: prompt columns on the left, response columns on the right.

Legend: B rows, L columns, R response columns, the same in every row.
"""

from collections.abc import Mapping

from torch import Tensor

SIGNAL = "signal/"  # begins the name of a batch's column that holds a signal, a known property of the text


def response_columns(response_mask: Tensor) -> int:
    """R, from response_mask (B, L) bool."""
    return int(response_mask[0].sum())


def signal_columns(signals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns of a batch from {signal: (B,)}."""
    return {SIGNAL + name: values for name, values in signals.items()}


def signals_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{signal: (B,)} from the columns of a batch."""
    return {name.removeprefix(SIGNAL): column for name, column in batch.items() if name.startswith(SIGNAL)}
