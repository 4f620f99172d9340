"""Training loops that take turns step by step, so that a busy spell of the machine falls on all of them alike."""

from collections.abc import Callable
from threading import Semaphore, Thread
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from timing import Times, interleave, timed
from torch import Tensor

Pause = Callable[[Tensor], None]


class Stepper:
    """A training loop that takes one step when asked to, so that loops can take turns step by step.

    train: the loop; it calls its argument with the loss at the end of every step. It runs in a thread of its own, which
    waits there; never more than one thread works at a time.
    """

    def __init__(self, train: Callable[[Pause], None]) -> None:
        self.losses: list[Tensor] = []
        self._error: BaseException | None = None
        self._over = False
        self._go, self._done = Semaphore(0), Semaphore(0)
        self._thread = Thread(target=self._run, args=(train,), daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Raises RuntimeError where the loop has come to its end."""
        if self._over:
            raise RuntimeError(f"the training was over after {len(self.losses)} steps")
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        if not self._over:
            self.step()
        self._thread.join()

    def _run(self, train: Callable[[Pause], None]) -> None:
        self._go.acquire()
        try:
            train(self._pause)
        except BaseException as error:
            self._error = error
        self._over = True
        self._done.release()

    def _pause(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        self._done.release()
        self._go.acquire()


class PauseAtTheEnd(Callback):
    """The last of the callbacks: it ends a step for the `Stepper`."""

    def __init__(self, pause: Pause) -> None:
        self.pause = pause

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.pause(outputs["loss"])  # what comes after, such as validation, counts to the next step


def take_turns(
    loops: dict[str, Callable[[Pause], None]], device: torch.device, clock: str, *, repeats: int, warmup: int
) -> tuple[Times, dict[str, list[float]]]:
    """Seconds of each loop's steps, as `interleave` measures them, and the losses of all of them."""
    steppers = {name: Stepper(loop) for name, loop in loops.items()}
    measures = {name: timed(stepper.step, device, clock) for name, stepper in steppers.items()}
    times = interleave(measures, repeats=repeats, warmup=warmup)
    for stepper in steppers.values():
        stepper.finish()
    return times, {name: [loss.item() for loss in stepper.losses] for name, stepper in steppers.items()}
