"""What planner, posterior and executor read of a prompt -> response batch.

Legend: B batch, T columns that are read, R response columns.
"""

from typing import Literal

from torch import Tensor

from models.functional.rows import response_columns

Tokens = tuple[Tensor, Tensor]  # ids (B, T) and which of them are real (B, T) bool
PosteriorReads = Literal["text", "all"]


def response_of(batch: dict[str, Tensor]) -> Tensor:
    """The ids of the responses (B, R)."""
    return batch["input_ids"][:, -response_columns(batch["response_mask"]) :]


def prompt_of(batch: dict[str, Tensor]) -> Tokens:
    columns = response_columns(batch["response_mask"])
    return batch["input_ids"][:, :-columns], batch["attention_mask"][:, :-columns]


def posterior_input(batch: dict[str, Tensor], reads: PosteriorReads) -> Tokens:
    """`all`: prompt and response; `text`: the response alone."""
    first = -response_columns(batch["response_mask"]) if reads == "text" else 0
    return batch["input_ids"][:, first:], batch["attention_mask"][:, first:]
