"""What every way of generating a response has in common.

Legend: B batch, L length, R response columns.
"""

from typing import Protocol

from torch import Generator, Tensor


class Decoder(Protocol):
    """Turns rows with a prompt into responses.

    name: its row in tables; method: teacher, student or control; forwards: network evaluations per sequence (0 for none).
    """

    name: str
    method: str
    forwards: int

    def __call__(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        """rows: input_ids (B, L), attention_mask (B, L), response_mask (B, L), the response's ids are not looked at.

        Returns response ids (B, R).
        """
        ...
