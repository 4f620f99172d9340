"""Exponential moving average (EMA) of the trainable weights; frozen bases and teachers are not copied."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from models.functional.errors import UsageError
from models.functional.weights import (
    copy_weights,
    distributed_like,
    snapshot,
    tensor_to_save,
    trainable_weights,
    update_average,
)


class TrainableEMA(Callback):
    """Keeps an average of every trainable parameter, validates with it, and leaves it in the module when training ends.

    decay: weight of the past; early on min(decay, (1 + n) / (10 + n)) after n steps. Checkpoints hold the raw weights
    and, in this callback's state, the average, so that a resumed run continues both.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise UsageError(f"callbacks.ema.decay={decay} must be at least 0 and less than 1")
        self.decay = decay
        self.steps = 0
        self.average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        live = trainable_weights(pl_module)
        if not self.average:
            self.average = snapshot(pl_module)
        self.average = {name: distributed_like(a.to(live[name].device), live[name]) for name, a in self.average.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._seen:  # an accumulation step: no weight has moved
            return
        self._seen = trainer.global_step
        update_average(self.average, pl_module, self.decay, self.steps)
        self.steps += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.average and trainer.state.fn == TrainerFn.FITTING:
            self._raw = snapshot(pl_module)
            copy_weights(pl_module, self.average)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._raw:
            copy_weights(pl_module, self._raw)
            self._raw = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.average and trainer.ckpt_path is not None:  # a checkpoint brought the raw weights
            copy_weights(pl_module, self.average)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        copy_weights(pl_module, self.average)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "average": {n: tensor_to_save(a) for n, a in self.average.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.average = state["steps"], dict(state["average"])
