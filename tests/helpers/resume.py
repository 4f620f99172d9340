"""A run that goes on from a checkpoint ends as the one that was not interrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.ema import TrainableEMA
from helpers.trainer import Losses, quiet_trainer


class BothRuns(NamedTuple):
    """Modules after their last step, and what was noted down: by the whole run, and by the one that was resumed."""

    whole: LightningModule
    resumed: LightningModule
    first: Losses
    second: Losses


def assert_resumed_is_uninterrupted(
    build: Callable[[], LightningModule],
    data: LightningDataModule,
    folder: Path,
    steps: int = 12,
    *,
    stop: int = 5,
    note: Callable[[], Losses] = Losses,
    **options,
) -> BothRuns:
    """Losses from step `stop` on and all weights are the same to the bit. build: a fresh module; options: of the trainer."""
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    runs = BothRuns(build(), build(), note(), note())
    callbacks = [TrainableEMA(0.9), keep, runs.first]
    quiet_trainer(steps, callbacks=callbacks, enable_checkpointing=True, **options).fit(runs.whole, data)
    trainer = quiet_trainer(steps, callbacks=[TrainableEMA(0.9), runs.second], **options)
    trainer.fit(runs.resumed, data, ckpt_path=folder / f"step={stop}.ckpt", weights_only=True)
    assert runs.second.seen == runs.first.seen[stop:]
    for name, value in runs.whole.state_dict().items():
        assert torch.equal(value, runs.resumed.state_dict()[name]), name
    return runs
