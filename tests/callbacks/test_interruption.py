"""A signal ends training after a step, with a checkpoint from which it goes on as if nothing had happened."""

import os
import pty
import signal

import pytest
import torch
from helpers.trainer import quiet_trainer
from lightning import Callback, LightningModule
from torch import nn

from callbacks.checkpoint import LastCheckpoint
from callbacks.ema import TrainableEMA
from callbacks.interruption import Interrupted, StopOnSignal
from callbacks.signals import SIGNALS, handle_signals
from datamodules.batch import TensorRows
from datamodules.loader import ResumableLoader
from lightning_modules.training.checkpoints import ReplacingCheckpointIO


@pytest.fixture(autouse=True)
def _a_terminal_that_counts():
    """nohup, under which tests may run, ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class Toy(LightningModule):
    """Linear regression with momentum, so that a lost optimiser state would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(3, 1)
        self.tested = 0

    def training_step(self, batch, batch_idx):
        return (self.head(batch["x"]) - batch["y"]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        self.tested += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        draw = torch.Generator().manual_seed(2)
        rows = {"x": torch.randn(16, 3, generator=draw), "y": torch.randn(16, 1, generator=draw)}
        return ResumableLoader(TensorRows(rows), batch_size=2, shuffle=True)

    def val_dataloader(self):
        return ResumableLoader(TensorRows({"x": torch.zeros(3, 3)}), batch_size=1)

    test_dataloader = val_dataloader


class Send(Callback):
    """Sends a signal to this process: before a batch of training (counted over epochs), of validation or of testing."""

    def __init__(self, signum: int, at: int, where: str = "train") -> None:
        self.signum, self.left = signum, at
        setattr(self, f"on_{'validation' if where == 'val' else where}_batch_start", self._count)

    def _count(self, *_) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)


def trainer_in(folder, *callbacks, accumulate: int = 1):
    keep = LastCheckpoint(folder, every_n_train_steps=100, save_top_k=0, save_last=True)
    watching = [TrainableEMA(0.3), *callbacks, StopOnSignal(), keep]
    trainer = quiet_trainer(
        12, callbacks=watching, enable_checkpointing=True, accumulate_grad_batches=accumulate, val_check_interval=5 * accumulate
    )  # fmt: skip
    trainer.strategy.checkpoint_io = ReplacingCheckpointIO()
    return trainer


@pytest.mark.parametrize(
    ("signum", "at", "where", "accumulate", "step"),
    [
        (signal.SIGINT, 3, "train", 1, 3),
        (signal.SIGTERM, 8, "train", 1, 8),  # the last batch of an epoch
        (signal.SIGTERM, 5, "train", 1, 5),  # a step that is validated
        (signal.SIGUSR1, 5, "train", 4, 2),  # the first micro-batch of four
        (signal.SIGUSR2, 12, "train", 1, 12),  # the last step
        (signal.SIGHUP, 4, "train", 1, 4),  # its terminal is closed
        (signal.SIGXCPU, 7, "train", 1, 7),  # Grid Engine
        (signal.SIGTERM, 2, "val", 1, 6),  # noted in the validation after step 5
    ],
)
def test_what_goes_on_from_the_checkpoint_of_a_signal_is_the_uninterrupted_run(
    tmp_path, signum, at, where, accumulate, step
):
    before = [signal.getsignal(kind) for kind in SIGNALS]
    whole, cut, resumed = Toy(), Toy(), Toy()
    trainer_in(tmp_path / "whole", accumulate=accumulate).fit(whole)
    with pytest.raises(Interrupted) as stopped:
        trainer_in(tmp_path, Send(signum, at, where), accumulate=accumulate).fit(cut)
    assert stopped.value.code == 128 + signum
    assert (stopped.value.step, stopped.value.checkpoint) == (step, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step
    assert [signal.getsignal(kind) for kind in SIGNALS] == before
    again = trainer_in(tmp_path, accumulate=accumulate)
    again.fit(resumed, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.global_step == 12
    assert torch.equal(resumed.head.weight, whole.head.weight)  # the averaged weights
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 12


def test_a_signal_ends_a_comparison_at_once(tmp_path):
    module = Toy()
    with pytest.raises(Interrupted) as stopped:
        trainer_in(tmp_path, Send(signal.SIGTERM, 2, "test")).test(module, verbose=False)
    assert (stopped.value.code, stopped.value.checkpoint, module.tested) == (143, None, 1)


def test_a_run_without_checkpoints_says_that_none_was_saved():
    callbacks = [Send(signal.SIGTERM, 2), StopOnSignal()]
    with pytest.raises(Interrupted) as stopped:
        quiet_trainer(5, callbacks=callbacks).fit(Toy())
    assert (stopped.value.step, stopped.value.checkpoint) == (2, None)


def test_the_second_ctrl_c_ends_at_once():
    child = os.fork()
    if child == 0:
        stop = StopOnSignal()
        stop._note(signal.SIGINT, None)
        stop._note(signal.SIGTERM, None)  # what a launcher sends after it does not hurry
        stop.received = signal.SIGINT
        stop._note(signal.SIGINT, None)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGINT


@pytest.mark.parametrize("to_file", [1, 2])
def test_nothing_is_written_to_a_terminal_that_was_closed(tmp_path, to_file):
    """What goes to a file still does."""
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    keyboard, screen = pty.openpty()
    os.close(keyboard)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(screen, 3 - to_file)
            os.dup2(log, to_file)
            with pytest.raises(OSError, match="Input/output error"):
                os.write(3 - to_file, b"x")
            handle_signals(StopOnSignal()._note)
            os.kill(os.getpid(), signal.SIGHUP)
            os.write(3 - to_file, b"x")
            os.write(to_file, b"kept")
            status = 0
        finally:
            os._exit(status)
    os.close(log)
    os.close(screen)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "log").read_text().endswith("kept")


def test_a_run_that_was_started_to_outlive_its_terminal_does(tmp_path):
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = trainer_in(tmp_path, Send(signal.SIGHUP, 3))
        trainer.fit(Toy())
        trainer_in(tmp_path, Send(signal.SIGHUP, 2, "test")).test(module := Toy(), verbose=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.global_step == 12
    assert module.tested == 3
