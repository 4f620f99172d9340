"""Rows of prompt and response: prompt columns on the left, response columns on the right.

Legend: B rows, L columns, R response columns, the same in every row.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.functional.next_token import EndIds, until_end

SIGNAL = "signal/"  # begins the name of a batch's column that holds a signal, a known property of the text


class SignalWords(NamedTuple):
    """Token ids of a signal's name and of each of its values; [] of a value without words."""

    name: list[int]
    values: list[list[int]]


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


def prompted_rows(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prompt -> response rows of any batch; the second half of a row of packed text is the response to the first."""
    names = ("input_ids", "attention_mask", "response_mask")
    if "labels" not in batch:
        return {name: batch[name] for name in names}
    ids = batch["input_ids"]
    response = torch.zeros_like(ids, dtype=torch.bool)
    response[:, ids.shape[1] // 2 :] = True
    return {"input_ids": ids, "attention_mask": torch.ones_like(response), "response_mask": response}


def signal_columns(signals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns of a batch from {signal: (B,)}."""
    return {SIGNAL + name: values for name, values in signals.items()}


def signals_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{signal: (B,)} from the columns of a batch."""
    return {name.removeprefix(SIGNAL): column for name, column in batch.items() if name.startswith(SIGNAL)}
