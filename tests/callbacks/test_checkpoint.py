"""The last checkpoint is that of the last step, wherever training ends."""

import pytest
import torch
from helpers.monitors import SixRows, Watched
from helpers.trainer import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.checkpoint import LastCheckpoint


def step_of_last(folder, kind, steps: int) -> int:
    keep = kind(folder, every_n_train_steps=4, save_top_k=0, save_last=True)
    quiet_trainer(steps, callbacks=[keep], enable_checkpointing=True).fit(Watched(), SixRows())
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("steps", [3, 4, 6, 8])
def test_the_last_checkpoint_is_of_the_last_step(tmp_path, steps):
    assert step_of_last(tmp_path, LastCheckpoint, steps) == steps


def test_lightning_s_own_is_not(tmp_path):
    assert step_of_last(tmp_path, ModelCheckpoint, 6) == 4


def test_going_on_from_the_end_goes_on(tmp_path):
    step_of_last(tmp_path, LastCheckpoint, 6)
    trainer = quiet_trainer(9)
    trainer.fit(Watched(), SixRows(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == 9


def test_a_shortened_run_leaves_none(tmp_path):
    keep = LastCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=0, save_last=True)
    quiet_trainer(1, callbacks=[keep], enable_checkpointing=True, fast_dev_run=True).fit(Watched(), SixRows())
    assert not list(tmp_path.iterdir())
