"""One progress bar for a stage, with rate and time left; where the output goes to a file, a line every tenth.

The comparison at the end says when it begins and when texts are scored. A stage that will take long also says so after its
first steps.
"""

import time
from collections.abc import Callable
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FIRST_ESTIMATE = 2  # steps after which a long stage says how long it will take
LONG = 600.0  # seconds


class StageProgress(ProgressBar):
    """Counts optimiser steps while training and batches while testing.

    stage: title of the bar. The time left assumes the mean rate so far, validation included.
    """

    def __init__(self, stage: str = "training") -> None:
        super().__init__()
        self.stage = stage
        self.console = Console()
        self._enabled = True
        self._progress: Progress | None = None
        self._begin(0, "")

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # -- training: steps --------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer.max_steps, self.stage, done=trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step > self._done:
            self._advance(trainer.global_step, lambda: self._named_metrics(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    # -- testing: batches -------------------------------------------------------------------------------------------

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # later than on_test_start, where a module may have work of its own to show
        batches = int(sum(trainer.num_test_batches))
        self._begin(batches, "comparing decoders")
        if batches and self._progress is None:
            self._say(f"comparing decoders: 0/{batches} batches")  # the first one may take long

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._advance(self._done + 1)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        if self._total:
            self._say("scoring the texts and drawing figures")

    # -- showing ----------------------------------------------------------------------------------------------------

    def _begin(self, total: int, title: str, done: int = 0) -> None:
        self._total, self._title, self._first, self._done = total, title, done, done
        self._started, self._printed = time.monotonic(), done * 10 // max(1, total)
        if total and self._enabled and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self.console,
            )
            self._task = self._progress.add_task(title, total=total, completed=done, rate="", metrics="")
            self._progress.start()

    def _say(self, line: str) -> None:
        if self._enabled:
            self.console.print(line, highlight=False, soft_wrap=True)

    def _named_metrics(self, trainer: Trainer, pl_module: LightningModule) -> str:
        metrics = self.get_metrics(trainer, pl_module)
        return "  ".join(_named(k, v) for k, v in metrics.items() if isinstance(v, float) and k != "v_num")

    def _advance(self, done: int, metrics: Callable[[], str] = str) -> None:
        """metrics: what is shown beside; asked for where a line is shown, for it takes time."""
        if not self._enabled:
            return
        self._done = done
        elapsed = time.monotonic() - self._started
        rate = (done - self._first) / max(elapsed, 1e-9)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, rate=_rate(rate), metrics=metrics())
            return
        left = (self._total - done) / max(rate, 1e-9)
        early = done == self._first + FIRST_ESTIMATE and left >= LONG
        if early or done * 10 // self._total > self._printed:
            self._printed = done * 10 // self._total
            line = f"{self._title}: {done}/{self._total}, {_rate(rate)}, {_clock(elapsed)} gone, {_clock(left)} left"
            self._say(f"{line}  {metrics()}")

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _named(name: str, value: float) -> str:
    """speed/tokens_per_s is tokens/s, and needs no decimals."""
    if name.endswith("_per_s"):
        return f"{name.removeprefix('speed/').removesuffix('_per_s')}/s {value:,.0f}"
    return f"{name.removeprefix('speed/')} {value:.3f}"


def _rate(rate: float) -> str:
    """Steps a second, or seconds each where they take longer."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{seconds:02d}"
