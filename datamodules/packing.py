"""Rows of equal length cut from one stream of tokens, and the order in which they are read.

Legend: N tokens of the stream, T tokens in a row, B rows of a batch. Row r is stream[rT : rT + T + 1]: the first T are its
input, the last T its targets, so that neighbours share one token and every token is a target exactly once but for the
stream's first. For training the stream repeats without end: what is left after the last whole row of a pass begins the next.
"""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loader import EpochSampler, rank_and_world
from datamodules.token_cache import TokenCache


class TokenStream:
    """The chosen documents of a cache, one after the other, repeated without end.

    chosen: which of its documents (bool, one each), in the order of the files; all where it is not given.
    """

    def __init__(self, cache: TokenCache, chosen: np.ndarray | None = None) -> None:
        self.cache = cache
        chosen = np.ones(len(cache.starts), bool) if chosen is None else chosen
        self.documents = int(chosen.sum())
        begins = np.append(cache.starts, len(cache.tokens))
        # neighbours that are both chosen make one piece
        edges = np.diff(chosen.astype(np.int8), prepend=0, append=0)
        self.starts, ends = begins[edges == 1], begins[edges == -1]
        self.offsets = np.concatenate([[0], np.cumsum(ends - self.starts)])

    def __len__(self) -> int:
        """N"""
        return int(self.offsets[-1])

    def spans(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The runs that make up stream[start : start + count]: (offset in it, offset in the cache, length) of each."""
        done = 0
        while done < count:
            at = (start + done) % len(self)
            piece = bisect_right(self.offsets, at) - 1
            length = min(count - done, int(self.offsets[piece + 1]) - at)
            yield done, int(self.starts[piece]) + at - int(self.offsets[piece]), length
            done += length


class PackedRows(Dataset):
    """Row r of a stream as a batch of one or more: `input_ids`, `labels` and `target_bytes`, all (B, T) int64.

    labels[i] is the token after input_ids[i]; target_bytes[i] is the UTF-8 bytes of text it encodes, 0 for `<bos>`.
    document_mask: also `document_ids`, which number the documents of a row from 0, and `position_ids`, which count from 0
        in each of them; a document that continues from the row before starts again at 0.
    endless: rows go on into the next pass; otherwise the last row is as long as what is left, and is a batch of its own.
    """

    def __init__(self, stream: TokenStream, length: int, *, document_mask: bool, endless: bool) -> None:
        self.stream, self.length, self.document_mask, self.endless = stream, length, document_mask, endless

    def __len__(self) -> int:
        """Rows of one pass, the shorter last one included."""
        return -(-(len(self.stream) - 1) // self.length)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        cache, length = self.stream.cache, self.length
        if not self.endless:
            length = min(length, len(self.stream) - 1 - max(rows) * length)
        tokens = np.empty((len(rows), length + 1), cache.tokens.dtype)
        sizes = np.empty((len(rows), length + 1), cache.target_bytes.dtype)
        runs = []
        for i, row in enumerate(rows):
            for done, at, count in self.stream.spans(row * self.length, length + 1):
                tokens[i, done : done + count] = cache.tokens[at : at + count]
                sizes[i, done : done + count] = cache.target_bytes[at : at + count]
                runs.append((i * length + done, at, min(count, length - done)))
        batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "target_bytes": sizes[:, 1:]}
        if self.document_mask:
            batch |= document_positions(cache.starts, np.array(runs), len(rows), length)
        return {
            name: torch.from_numpy(column.astype(np.int64, order="C", copy=False)) for name, column in batch.items()
        }


def document_positions(starts: np.ndarray, runs: np.ndarray, rows: int, length: int) -> dict[str, np.ndarray]:
    """`document_ids` and `position_ids`, (B, T) int64, see `PackedRows`.

    starts: where each document begins in the cache. runs (S, 3): the pieces that make up the inputs, row after row: offset
    in the flattened batch, offset in the cache, length.
    """
    offset, at, count = runs.T
    # 1. where documents begin in the batch, and where rows do
    first, last = np.searchsorted(starts, [at, at + count])
    number = last - first
    own = np.arange(number.sum()) + np.repeat(last - number.cumsum(), number)
    begins = np.union1d(starts[own] + np.repeat(offset - at, number), np.arange(0, rows * length, length))
    # 2. every token's distance from the last of them, and how many there are before it in its row
    lengths, in_row = np.diff(begins, append=rows * length), begins % length
    numbers = np.arange(len(begins)) - np.searchsorted(begins, begins - in_row)
    documents, positions = (np.repeat(each, lengths).reshape(rows, length) for each in (numbers, in_row))
    # fresh memory of this size costs more than the arithmetic
    np.subtract(np.arange(length), positions, out=positions)
    return {"document_ids": documents, "position_ids": positions}


class EndlessOrder(EpochSampler):
    """Batches of row numbers of a stream that repeats without end; each row is read once, in exact batches.

    The rows that begin in one pass are read in an order that is a function of (seed, pass), or as they lie. Batches follow
    each other without regard to passes: an epoch is as many whole batches as fit into a pass (times `passes()`), and the rows
    that are left open the next epoch.
    """

    def __init__(
        self, tokens: int, length: int, batch_size: int, *, shuffle: bool, seed: int, accumulate: int = 1
    ) -> None:
        super().__init__(
            tokens // length, batch_size, shuffle=shuffle, drop_last=True, seed=seed, accumulate=accumulate
        )
        self.tokens, self.length = tokens, length

    def batches_per_pass(self) -> int:
        return max(1, super().batches_per_pass())

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = rank_and_world()
        per_step = self.rows_per_step()
        rows = self._rows((self.epoch * len(self) + self.start) * per_step)
        for _ in range(self.start, len(self)):
            yield [next(rows) for _ in range(per_step)][rank::world]

    def _rows(self, start: int) -> Iterator[int]:
        """The row numbers in the order of reading, from the `start`-th on."""
        number = start * self.length // self.tokens
        while True:
            first, last = self._first_row(number), self._first_row(number + 1)
            order = self.order_of(last - first, number)
            for part in order[start - first :].split(2**16):
                yield from (first + part).tolist()
            start, number = last, number + 1

    def _first_row(self, number: int) -> int:
        """The first row that begins in a pass."""
        return -(-number * self.tokens // self.length)


class OnePass(EpochSampler):
    """Batches of the rows of one pass as they lie; a last row that is shorter is a batch of its own."""

    def __init__(self, tokens: int, length: int, batch_size: int) -> None:
        super().__init__((tokens - 1) // length, batch_size, shuffle=False, drop_last=False, seed=0)
        self.has_rest = (tokens - 1) % length > 0

    def batches_per_pass(self) -> int:
        return super().batches_per_pass() + self.has_rest

    def __iter__(self) -> Iterator[list[int]]:
        yield from super().__iter__()
        if self.has_rest and rank_and_world()[0] == 0:
            yield [self.rows]
