"""What a forward pass of sampling reads: all columns, or those alone whose keys and values are not known yet.

Legend: B batch, L columns, R response columns, D width.
"""

from collections.abc import Callable

from torch import Tensor

from models.backbones.bidirectional import is_block_causal
from models.backbones.column_cache import ColumnCache
from models.backbones.llada import LladaModel
from models.backbones.masked_from_causal import MaskedFromCausal
from models.functional.errors import UsageError
from models.functional.rows import response_columns
from models.interfaces.masked_sampling import ReusedColumns

# ids (B, L), start, end -> the states (B, end - start, D) of the response columns from start to end (exclusive)
Reader = Callable[[Tensor, int, int], Tensor]
NOTHING_REUSED = ReusedColumns()


def response_reader(
    model: LladaModel | MaskedFromCausal, rows: dict[str, Tensor], reused: ReusedColumns = NOTHING_REUSED
) -> Reader:
    """A reader of the rows' responses. What cannot change any more is read once, where the model's attention allows it.

    reused: for the other models, which of their columns are not read in every pass although they change.
    """
    if reused.cache != "none":
        require_bidirectional_body(model, reused.cache)
        return ReusingReader(model, rows, reused)
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


def require_bidirectional_body(model: object, cache: str) -> None:
    """Raise UsageError for a model whose keys and values are not reused approximately. cache: what was typed."""
    if not isinstance(model, LladaModel) or is_block_causal(model):
        raise UsageError(
            f"module.cache={cache} is for LLaDA's bidirectional body; other models keep the keys and values that stay "
            "exact, without any option; type module.cache=none"
        )


class CachedColumns:
    """Rows of a LLaDA body (B, L), of which a pass reads some columns beside the keys and values that others left."""

    def __init__(self, model: LladaModel, rows: dict[str, Tensor]) -> None:
        self.model, self.cache = model, ColumnCache()
        self.visible, self.positions = model.layout(rows["attention_mask"], rows["response_mask"])
        self.count = self.visible.shape[-1]
        self.prompt = self.count - response_columns(rows["response_mask"])

    def states(self, ids: Tensor, first: int, last: int, keys: int) -> Tensor:
        """States (B, last - first, D) of the columns from first to last (exclusive), which see the first `keys` columns."""
        return self.model.states(
            self.model.embed(ids[:, first:last]),
            self.visible[:, :, first:last, :keys],
            self.positions[:, first:last],
            kept=self.cache.beginning_at(first),
        )


class BlockReader:
    """Reads a block-causal model block by block, from left to right; the result is that of reading all columns.

    The keys and values of prompt and finished blocks are computed once from their tokens: in the first pass over the block
    after them. Every other pass reads its block alone.
    """

    def __init__(self, model: LladaModel, rows: dict[str, Tensor]) -> None:
        self.columns = CachedColumns(model, rows)
        self.known = 0  # columns whose tokens had been settled when they were read

    def __call__(self, ids: Tensor, start: int, end: int) -> Tensor:
        first, last = self.columns.prompt + start, self.columns.prompt + end
        states = self.columns.states(ids, self.known, last, keys=last)[:, first - self.known :]
        self.known = first
        return states


class ReusingReader:
    """Reads a bidirectional model with keys and values that earlier passes left, as `ReusedColumns` says.

    The first pass over a block reads all columns, later ones the block, and with `prefix` the columns after it.
    """

    def __init__(self, model: LladaModel, rows: dict[str, Tensor], reused: ReusedColumns) -> None:
        self.columns, self.reused = CachedColumns(model, rows), reused
        self.start: int | None = None  # of the block that is filled
        self.passes = 0  # over it

    def __call__(self, ids: Tensor, start: int, end: int) -> Tensor:
        prompt, count = self.columns.prompt, self.columns.count
        first, last = prompt + start, prompt + end
        # 1. which columns are read
        if start != self.start:
            self.start, self.passes = start, 0
        refresh = self.reused.refresh
        everything = self.passes == 0 or (refresh is not None and self.passes % refresh == 0)
        self.passes += 1
        begin, stop = (0, count) if everything else (first, last if self.reused.cache == "dual" else count)
        # 2. their states, beside the keys and values of all others
        return self.columns.states(ids, begin, stop, keys=count)[:, first - begin : last - begin]
