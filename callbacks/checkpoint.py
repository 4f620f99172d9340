"""Checkpoints every so many steps, and one of the end: what is tested and exported later is what was compared."""

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
