"""The base of monitors that watch training steps: sums over steps and ranks, logged and cleared after each validation."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from models.functional.ranks import is_rank_zero, summed


class StepMonitor(Callback):
    """Subclasses add totals and how much each counts; `monitor/<name>` is their ratio since the last validation.

    The sums travel in checkpoints, so that a resumed run logs what the uninterrupted one does.
    """

    names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.sums = torch.zeros(len(self.names), 2, dtype=torch.float64)  # totals and counts

    def add(self, name: str, values: Tensor) -> None:
        """One value for each thing that counts, (N,)."""
        values = values.detach().double()
        at = self.names.index(name)
        self.sums = self.sums.to(values.device)
        self.sums[at] += torch.stack([values.sum(), values.new_tensor(values.numel())])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sums = self.sums.to(pl_module.device)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self.log_and_clear(pl_module)

    def log_and_clear(self, module: LightningModule) -> None:
        for name, (total, count) in zip(self.names, summed(self.sums).tolist(), strict=True):
            if count:
                module.log(f"monitor/{name}", total / count, sync_dist=True)
        self.sums = torch.zeros_like(self.sums)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": summed(self.sums).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = state["sums"].clone() if is_rank_zero() else torch.zeros_like(state["sums"])
