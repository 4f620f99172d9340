"""Checkpoints every few steps and at the end, so that `last.ckpt` is the model that the run compared."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Lightning's, whose `last.ckpt` is also written when training ends between two of its steps."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        # not at the end of training: Lightning has then counted the epoch as complete, and a longer run would skip its rest
        if trainer.global_step == trainer.max_steps:
            self._save_unless_saved(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        if trainer.global_step != trainer.max_steps:
            self._save_unless_saved(trainer)
        super().on_train_end(trainer, pl_module)

    def _save_unless_saved(self, trainer: Trainer) -> None:
        steps = self._every_n_train_steps  # 0 where epochs are counted
        if self.save_last and not trainer.fast_dev_run and (not steps or trainer.global_step % steps):
            save_last(trainer, self)


def save_last(trainer: Trainer, keep: ModelCheckpoint) -> Path:
    """Write the `last.ckpt` of a checkpoint callback now; its path."""
    path = last_of(keep)
    # else Lightning takes the file for another run's, and writes last-v1.ckpt beside it
    keep.last_model_path = keep._last_checkpoint_saved = str(path)
    trainer.save_checkpoint(path)
    return path


def last_of(keep: ModelCheckpoint) -> Path:
    """Where a checkpoint callback keeps its newest checkpoint."""
    return Path(keep.dirpath) / f"{keep.CHECKPOINT_NAME_LAST}{keep.FILE_EXTENSION}"
