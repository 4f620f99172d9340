r"""Block diffusion: blocks from left to right, the tokens of a block by masked diffusion (Arriola et al., 2503.09573).

.. math:: -\log p(x) = -\sum_b \log p(x^b \mid x^{<b})
          \le \sum_b E_{t \sim U(0, 1)} \Big[ \frac{1}{t} \sum_{l \in M_t} -\log p(x_l \mid x^b_t, x^{<b}) \Big]

M_t are the masked tokens of the block, each masked with probability t.
Legend: B batch, L columns, N blocks of a response, b tokens of a block.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.functional.uniform import uniform


def block_numbers(response: Tensor, block_length: int | None) -> Tensor:
    """The block of each column, (B, L) int64: 0 is the prompt, 1, 2, ... are the blocks of the response.

    response (B, L) bool. block_length: tokens of a block, of which the last one may have fewer; None: one block.
    """
    if block_length is None:
        return response.long()
    number = (response.long().cumsum(-1) - 1) // block_length + 1
    return number.masked_fill(~response, 0)


def block_attention(block: Tensor, noised: Tensor, seen: Tensor) -> Tensor:
    """Who sees whom among clean and noised columns, (B, 1, L, L) bool.

    Every column sees the clean columns of earlier blocks. Of its own block a clean column sees the clean ones and a noised
    column the noised ones, on both sides. block (B, L): see `block_numbers`. noised (B, L) bool. seen (B, L) bool is False on
    padding. A padding query sees itself, so that no row of scores is empty.
    """
    query, key = block.unsqueeze(-1), block.unsqueeze(-2)
    earlier = (key < query) & ~noised.unsqueeze(-2)
    own = (key == query) & (noised.unsqueeze(-1) == noised.unsqueeze(-2))
    itself = torch.eye(block.shape[-1], dtype=torch.bool, device=block.device)
    return (((earlier | own) & seen.unsqueeze(-2)) | itself).unsqueeze(1)


def of_own_block(values: Tensor, block: Tensor) -> Tensor:
    """The value of each column's block, (B, L), that of block 1 in the prompt; values (B, N) of blocks 1 .. N, block (B, L)."""
    return values.gather(1, (block - 1).clamp(min=0))


def block_sizes(block: Tensor) -> Tensor:
    """Tokens of each block 1 .. N, (B, N), from the block of each column (B, L)."""
    return F.one_hot(block).sum(1)[:, 1:]


def hide_in_blocks(block: Tensor, count: Tensor, generator: Generator) -> Tensor:
    """Bool (B, L): `count` (B, N) of the tokens of each block, every choice equally likely; block (B, L)."""
    order = block + uniform(*block.shape, generator=generator).double()
    rank = order.argsort(-1).argsort(-1)  # those of a block follow on each other
    in_earlier = (block.unsqueeze(-2) < block.unsqueeze(-1)).sum(-1)
    return (block > 0) & (rank - in_earlier < of_own_block(count, block))


def before_last_block(block: Tensor) -> int:
    """How many of the first columns hold all blocks but the last, from block (B, L)."""
    earlier = (block < block.max()).any(0)
    return len(earlier) - int(earlier.flip(0).long().argmax()) if bool(earlier.any()) else 0
