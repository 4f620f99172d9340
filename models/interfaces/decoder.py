"""What every way of generating a response has in common.

Legend: B batch, L length, R response columns.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Generator, Tensor

# called with the tokens so far: (B, n) from left to right, or (B, R) with masks where all positions are refined
TokenCallback = Callable[[Tensor], None]
# asked after every token with those so far (B, n): which texts have ended, (B,) bool
StopRule = Callable[[Tensor], Tensor]


class Decoder(Protocol):
    """Generates the responses of rows with a prompt.

    name: its row in tables; method: teacher, student or control; forwards: forward passes per sequence (NFE), 0 for none.
    refines: whether every forward pass may change all positions, instead of adding one token after the other. Controls have
    no such attribute and take no callback.
    """

    name: str
    method: str
    refines: bool

    @property
    def forwards(self) -> int: ...

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        """Response ids (B, R) of rows with input_ids, attention_mask and response_mask, (B, L) each.

        The ids of the response columns are not read. on_tokens is called with the tokens as they grow, last with what is
        returned.
        """
        ...


def forward_passes_of(decoder: Decoder, texts: int) -> Tensor:
    """Of each of the `texts` that a decoder generated last, (texts,)."""
    own = getattr(decoder, "forward_passes", None)
    return torch.full((texts,), decoder.forwards) if own is None else own
