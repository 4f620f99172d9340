"""What a forward pass of sampling reads: all columns, or those alone whose keys and values are not known yet.

Legend: B batch, L columns, R response columns, D width.
"""

from collections.abc import Callable

from torch import Tensor

from models.backbones.bidirectional import is_block_causal
from models.backbones.column_cache import ColumnCache
from models.backbones.llada import LladaModel
from models.backbones.masked_from_causal import MaskedFromCausal
from models.functional.rows import response_columns

# ids (B, L), start, end -> the states (B, end - start, D) of the response columns from start to end (exclusive)
Reader = Callable[[Tensor, int, int], Tensor]


def response_reader(model: LladaModel | MaskedFromCausal, rows: dict[str, Tensor]) -> Reader:
    """A reader of the rows' responses. What cannot change any more is read once, where the model's attention allows it."""
    attention_mask, response_mask = rows["attention_mask"], rows["response_mask"]
    if isinstance(model, MaskedFromCausal):
        read = model.response_reader(attention_mask, response_mask)
        return lambda ids, start, end: read(ids)[:, start:end]
    if is_block_causal(model):
        return BlockReader(model, rows)
    prompt = attention_mask.shape[1] - response_columns(response_mask)

    def read_all(ids: Tensor, start: int, end: int) -> Tensor:
        states = model.hidden(model.embed(ids), attention_mask, response_mask=response_mask)
        return states[:, prompt + start : prompt + end]

    return read_all


class BlockReader:
    """Reads a block-causal model block by block, from left to right; the result is that of reading all columns.

    The keys and values of prompt and finished blocks are computed once from their tokens: in the first pass over the block
    after them. Every other pass reads its block alone.
    """

    def __init__(self, model: LladaModel, rows: dict[str, Tensor]) -> None:
        self.model = model
        self.visible, self.positions = model.layout(rows["attention_mask"], rows["response_mask"])
        self.prompt = self.visible.shape[-1] - response_columns(rows["response_mask"])
        self.known = 0  # columns whose tokens had been settled when they were read
        self.cache = ColumnCache()

    def __call__(self, ids: Tensor, start: int, end: int) -> Tensor:
        first, last = self.prompt + start, self.prompt + end
        columns = slice(self.known, last)
        states = self.model.states(
            self.model.embed(ids[:, columns]),
            self.visible[:, :, columns, :last],
            self.positions[:, columns],
            kept=self.cache.beginning_at(self.known),
        )
        states = states[:, first - self.known :]
        self.known = first
        return states
