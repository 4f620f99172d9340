"""What every way of generating a response has in common.

Legend: B batch, L length, R response columns.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Generator, Tensor

# called with what stands so far: (B, n) where tokens follow each other, (B, R) with masks where all places are refined
TokenCallback = Callable[[Tensor], None]


class Decoder(Protocol):
    """Turns rows with a prompt into responses.

    name: its row in tables; method: teacher, student or control; forwards: network evaluations per sequence (0 for none).
    refines: whether every forward may touch all places, instead of one token after the other. Controls have no such thing
    and cannot be watched.
    """

    name: str
    method: str
    forwards: int
    refines: bool

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        """rows: input_ids (B, L), attention_mask (B, L), response_mask (B, L), the response's ids are not looked at.

        Returns response ids (B, R). on_tokens: sees them grow; its last call has what is returned.
        """
        ...
