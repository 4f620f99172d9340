"""Checkpoints every few steps and at the end, so that `last.ckpt` is the model that the run compared."""

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Lightning's, whose `last.ckpt` is also written when training ends between two of its steps."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        super().on_train_end(trainer, pl_module)
        steps = self._every_n_train_steps  # 0 where epochs are counted
        if self.save_last and (not steps or trainer.global_step % steps):
            trainer.save_checkpoint(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
