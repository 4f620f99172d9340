"""Rows of prompt and response: prompt columns on the left, response columns on the right.

Legend: B rows, L columns, R response columns, the same in every row.
"""

from collections.abc import Mapping

from torch import Tensor

from models.functional.next_token import EndIds, until_end

SIGNAL = "signal/"  # begins the name of a batch's column that holds a signal, a known property of the text


def response_columns(response_mask: Tensor) -> int:
    """R, from response_mask (B, L) bool."""
    return int(response_mask[0].sum())


def with_responses(rows: Mapping[str, Tensor], responses: Tensor, end_ids: EndIds) -> dict[str, Tensor]:
    """The rows with other responses (B, R), whose tokens count up to the first end token."""
    columns = responses.shape[1]
    ids, counts = rows["input_ids"].clone(), rows["response_mask"].clone()
    ids[:, -columns:] = responses
    counts[:, -columns:] = until_end(responses, end_ids)
    return {**rows, "input_ids": ids, "completion_mask": counts}


def signal_columns(signals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns of a batch from {signal: (B,)}."""
    return {SIGNAL + name: values for name, values in signals.items()}


def signals_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{signal: (B,)} from the columns of a batch."""
    return {name.removeprefix(SIGNAL): column for name, column in batch.items() if name.startswith(SIGNAL)}
