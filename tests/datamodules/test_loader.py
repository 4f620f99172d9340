"""The order of rows: by the seed, resumed, over ranks."""

import pytest
import torch
from helpers.pairs import ROWS
from helpers.trainer import quiet_trainer
from lightning import LightningModule
from torch import nn

from callbacks.checkpoint import LastCheckpoint
from datamodules.loader import EpochSampler
from reporting.console import sentence_for

# -- order of rows ---------------------------------------------------------------------------------------------------


def order(loader):
    return [batch["row_index"].tolist() for batch in loader]


def test_the_same_seed_gives_the_same_order_and_each_epoch_another(build_pairs):
    same = {"val": ROWS, "test": ROWS}
    first, again, other = (build_pairs(seed=seed, **same).train_dataloader() for seed in (1, 1, 2))
    assert order(first) == order(again) != order(other)
    first.set_epoch(1)
    assert order(first) != order(again)
    assert order(build_pairs(**same).val_dataloader()) == order(build_pairs(**same).val_dataloader())


@pytest.mark.filterwarnings("ignore:.*no optimizer", "ignore:.*returned .None.", "ignore:.*no .validation_step")
def test_a_trainer_tells_the_loader_its_epoch(build_pairs):
    class Reader(LightningModule):
        def training_step(self, batch, batch_idx):
            read.append(batch["row_index"].tolist())

        def configure_optimizers(self):
            return None

    datamodule, read = build_pairs(val=ROWS, test=ROWS), []
    quiet_trainer(-1, max_epochs=2, limit_val_batches=0).fit(Reader(), datamodule)
    first, second = datamodule.train_dataloader(), datamodule.train_dataloader()
    second.set_epoch(1)
    assert read == order(first) + order(second)
    assert order(first) != order(second)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_loader_continues_at_the_exact_batch(build_pairs, workers):
    datamodule = build_pairs(val=ROWS, test=ROWS, num_workers=workers)
    whole, cut, resumed = (datamodule.train_dataloader() for _ in range(3))
    for loader in (whole, cut, resumed):
        loader.set_epoch(2)
    batches = iter(cut)
    read = [next(batches)["row_index"].tolist() for _ in range(2)]
    resumed.load_state_dict(cut.state_dict())
    rest = order(resumed)
    assert len(rest) == 4
    assert read + rest == order(whole)
    resumed.set_epoch(3)
    assert len(order(resumed)) == 6


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_a_worker_that_dies_while_it_sends_a_batch_is_named_as_one(build_pairs, monkeypatch, error):
    def broken(loader):
        yield {"row_index": torch.tensor([0])}
        raise error

    datamodule = build_pairs(val=ROWS, test=ROWS)
    loader = datamodule.train_dataloader()
    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", broken)
    with pytest.raises(type(error)):  # not of a process: an error like any other
        list(loader)
    loader.num_workers = 1
    with pytest.raises(RuntimeError) as raised:
        list(loader)
    assert "a process that loads data has died" in sentence_for(raised.value)


@pytest.mark.filterwarnings("ignore:.*no .validation_step")
def test_accumulation_spans_passes_over_the_rows(build_pairs, tmp_path):
    """6 batches a pass, 4 a step: every step has 4, as one long pass would give them, and a resumed run reads the same."""

    class Reader(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            read.append((self.global_step, batch["row_index"].tolist()))
            return self.weight * 1.0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(steps: int, **options) -> list:
        read.clear()
        keep = LastCheckpoint(tmp_path, every_n_train_steps=100, save_top_k=0, save_last=True)
        shape = {"accumulate_grad_batches": 4, "limit_val_batches": 0}
        quiet_trainer(steps, callbacks=[keep], enable_checkpointing=True, **shape).fit(Reader(), datamodule, **options)
        return list(read)

    datamodule, read = build_pairs(val=ROWS, test=ROWS), []
    whole = run(9)
    assert [step for step, _ in whole] == [step for step in range(9) for _ in range(4)]
    passes = []
    for number in range(6):
        loader = build_pairs(val=ROWS, test=ROWS).train_dataloader()  # without a trainer: a pass an epoch
        loader.set_epoch(number)
        passes += order(loader)
    assert [rows for _, rows in whole] == passes
    assert whole == run(4) + run(9, ckpt_path=tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(("rows", "drop_last"), [(11, False), (9, False), (12, False), (12, True)])
def test_two_ranks_see_each_row_exactly_once(rows, drop_last, monkeypatch):
    batches = []
    for rank in range(2):
        monkeypatch.setattr("datamodules.loader.rank_and_world", lambda rank=rank: (rank, 2))
        sampler = EpochSampler(rows, 2, shuffle=True, drop_last=drop_last, seed=5)
        batches.append(list(sampler))
    seen = [row for rank in batches for batch in rank for row in batch]
    assert sorted(seen) == list(range(rows))
    monkeypatch.setattr("datamodules.loader.rank_and_world", lambda: (0, 1))
    # Together the ranks see the batches that one rank with twice the batch size sees.
    one = list(EpochSampler(rows, 4, shuffle=True, drop_last=drop_last, seed=5))
    assert [sorted(a + b) for a, b in zip(*batches, strict=False)] == [
        sorted(batch) for batch in one[: len(batches[1])]
    ]
