"""A DataLoader that continues in mid-epoch at the exact batch, on any number of ranks.

The order of a pass over the rows is a function of (seed, its number) alone, and the position in an epoch travels in the
checkpoint, so a resumed run reads what the uninterrupted one would have read.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


class EpochSampler(Sampler[list[int]]):
    """Batches of row indices: shuffled by (seed, pass) when training, in file order otherwise.

    Ranks take alternate rows of the same global batch, so N ranks with batch_size / N rows each see together what one
    rank with batch_size rows sees. `drop_last` discards the incomplete global batch; without it every row is visited once.

    lengths: tokens of each row (rows,). Shuffled rows of like length then share a batch: of every 50 batches the rows are
        sorted by length, and the batches shuffled.
    accumulate: batches of an optimiser step. An epoch is then the fewest passes over the rows whose batches fill whole
    steps, because Lightning steps the optimiser at an epoch's last batch even where accumulation is not complete.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        accumulate: int = 1,
        lengths: Tensor | None = None,
    ) -> None:
        self.rows, self.batch_size, self.shuffle, self.drop_last, self.seed = rows, batch_size, shuffle, drop_last, seed
        self.accumulate, self.lengths = accumulate, lengths
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> "EpochSampler":
        """Itself: a trainer calls `set_epoch` of a batch sampler's `sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def rows_per_step(self) -> int:
        """Of all ranks together."""
        return self.batch_size * rank_and_world()[1]

    def batches_per_pass(self) -> int:
        """Over all rows once."""
        per_step = self.rows_per_step()
        return self.rows // per_step if self.drop_last else -(-self.rows // per_step)

    def passes(self) -> int:
        """Of an epoch."""
        return self.accumulate // math.gcd(self.batches_per_pass(), self.accumulate)

    def __len__(self) -> int:
        return self.batches_per_pass() * self.passes()

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = rank_and_world()
        per_step, per_pass, before = self.rows_per_step(), self.batches_per_pass(), self.epoch * self.passes()
        current, order = None, None
        for step in range(self.start, len(self)):
            number, at = divmod(step, per_pass)
            if number != current:
                current, order = number, self.order_of(self.rows, before + number)
            chosen = order[at * per_step : (at + 1) * per_step][rank::world].tolist()
            if chosen:
                yield chosen

    def order_of(self, rows: int, number: int) -> Tensor:
        """The order (rows,) in which the number-th pass reads its rows."""
        if not self.shuffle:
            return torch.arange(rows)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(rows, generator=generator)
        if self.lengths is None:
            return order
        return torch.cat([self._by_length(some, generator) for some in order.split(50 * self.rows_per_step())])

    def _by_length(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The rows sorted by length, in batches of a step that are shuffled; what fills no batch comes last."""
        assert self.lengths is not None
        per_step = self.rows_per_step()
        whole = len(rows) // per_step * per_step
        first, rest = rows[:whole], rows[whole:]
        batches = first[self.lengths[first].argsort(stable=True)].view(-1, per_step)
        return torch.cat([batches[torch.randperm(len(batches), generator=generator)].flatten(), rest])


class ResumableLoader(DataLoader):
    """`DataLoader` over rows fetched a batch at a time whose `state_dict` is the number of batches handed out in this epoch.

    lengths: see `EpochSampler`. order: replaces the order that the options before it describe. collate: what is done with each
    batch of rows.
    After an epoch's last batch that number is 0: a run that resumes there begins the next epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        accumulate: int = 1,
        lengths: Tensor | None = None,
        order: EpochSampler | None = None,
        collate: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        num_workers: int = 0,
    ) -> None:
        if order is None:
            order = EpochSampler(
                len(dataset),
                batch_size,
                shuffle=shuffle,
                drop_last=drop_last,
                seed=seed,
                accumulate=accumulate,
                lengths=lengths,
            )
        self.order = order
        self.handed_out = 0
        self.resume_at = 0
        super().__init__(
            dataset,
            batch_sampler=self.order,
            num_workers=num_workers,
            collate_fn=collate or _already_batched,
            pin_memory=torch.cuda.is_available(),
        )

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.order.start = self.handed_out = self.resume_at
        self.resume_at = 0
        for batch in self._batches():
            self.handed_out += 1
            yield batch
        self.handed_out = 0

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Errors: RuntimeError as torch words it also where a process that loads data dies while it hands a batch over."""
        try:
            yield from super().__iter__()
        except (ConnectionError, EOFError) as error:
            if self.num_workers == 0:
                raise
            raise RuntimeError("DataLoader worker exited unexpectedly: its connection has ended") from error

    def state_dict(self) -> dict[str, Any]:
        return {"handed_out": self.handed_out % max(1, len(self)), "rows_per_step": self.order.rows_per_step()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resume_at = state["handed_out"]
        now = self.order.rows_per_step()
        before = state.get("rows_per_step", now)
        if before != now:
            rank_zero_warn(
                f"the run took {before} rows a step and now takes {now}, so it does not go on at the exact row; "
                f"type data.batch_size={before / rank_and_world()[1]:g} for that"
            )


def accumulated(trainer: Any) -> int:
    """Batches of an optimiser step of a datamodule's trainer; 1 where there is none."""
    return 1 if trainer is None else trainer.accumulate_grad_batches


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _already_batched(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch
