"""Signals during training: the current step is finished and saved, then the process ends with the signal's exit status."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.checkpoint import last_of, save_last
from callbacks.signals import EndedBySignal, handle_signals


class Interrupted(EndedBySignal):
    """Ends a training. step: the optimiser step that was finished. checkpoint: holds the state after it; None where nothing
    was saved."""

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        super().__init__(signum)
        self.step, self.checkpoint = step, checkpoint


class StopOnSignal(Callback):
    """Ends training after the optimiser step in which a signal arrives, with a checkpoint from which it goes on exactly.

    Its handlers stand until the trainer restores those of before, at the end of every fit and test.
    They replace Lightning's, which save nothing (SIGINT, SIGTERM) or put a Slurm job into the queue again. The
    checkpoint is the `last.ckpt` of the run's checkpoint callback. A second Ctrl-C ends the process at once.
    It is the last callback of a trainer, so that the state of all others is that of the finished step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._speaks = True

    # -- training -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.received, self._speaks = None, trainer.is_global_zero
        handle_signals(self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == self.received == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if self.received is None and self._speaks:
            # not print: a handler may run while something else prints
            again = "; Ctrl-C again ends at once" if signum == signal.SIGINT else ""
            with suppress(OSError):  # the terminal may be closed
                os.write(2, f"\n{signal.Signals(signum).name}: saving after this step{again}\n".encode())
        self.received = signum

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        # one rank may have received the signal, and all of them have to save together
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            keep = _keeper(trainer)
            path = None if keep is None else save_last(trainer, keep)
            raise Interrupted(self.received or signal.SIGTERM, trainer.global_step, path)

    # -- comparison: nothing to save ----------------------------------------------------------------------------------

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def end(signum: int, frame: FrameType | None) -> None:
            if hasattr(trainer.strategy.launcher, "kill"):  # ranks that would wait for this one
                trainer.strategy.launcher.kill(signum)
            keep = _keeper(trainer)
            saved = keep is not None and last_of(keep).is_file()
            raise Interrupted(signum, trainer.global_step, last_of(keep) if saved else None)

        handle_signals(end)


def _keeper(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that keeps the run's checkpoints; None for a run that keeps none."""
    keep = trainer.checkpoint_callback
    return keep if isinstance(keep, ModelCheckpoint) and keep.dirpath and not trainer.fast_dev_run else None
