"""What planner, posterior and executor read of a prompt -> response batch.

Legend: B batch, T columns that are read, R response columns.
"""

from typing import Any, Literal

from torch import Tensor

from models.functional.errors import UsageError
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


def require_all_columns(data: Any, what: str) -> None:
    """Raise UsageError for a corpus whose training rows have fewer response columns than texts that are generated.

    what: the option whose texts are written at once. Such a text depends on how many masks there are.
    """
    if getattr(data, "group_by_length", False):
        raise UsageError(
            f"data.group_by_length=true cuts columns off in training that are there when texts are generated, and {what} "
            "depends on how many there are; type data.group_by_length=false"
        )
