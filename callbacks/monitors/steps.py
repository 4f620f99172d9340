"""The base of monitors of training steps: means over steps and ranks, logged after each validation."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from models.functional.ranks import is_rank_zero, summed


class StepMonitor(Callback):
    """Subclasses `add` values under the names in `names`; `monitor/<name>` is their mean since the last validation.

    `take_recent` gives the means since it was last called, for whoever looks more often than the training validates.
    All sums are in checkpoints, so that a resumed run logs what the uninterrupted one does.
    """

    names: tuple[str, ...] = ()

    def __init__(self) -> None:
        # [total, count] of each name: since the last validation, and since the last `take_recent`
        self.sums = torch.zeros(len(self.names), 2, dtype=torch.float64)
        self.recent = torch.zeros_like(self.sums)

    def add(self, name: str, values: Tensor) -> None:
        """Values that count one each, (N,)."""
        values = values.detach().double()
        at = self.names.index(name)
        own = torch.stack([values.sum(), values.new_tensor(values.numel())])
        self.sums, self.recent = self.sums.to(values.device), self.recent.to(values.device)
        self.sums[at] += own
        self.recent[at] += own

    def take_recent(self) -> dict[str, float]:
        """Means since the last call, of names that got a value; every rank calls it."""
        found = self._means(self.recent)
        self.recent = torch.zeros_like(self.recent)
        return found

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sums, self.recent = self.sums.to(pl_module.device), self.recent.to(pl_module.device)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self.log_and_clear(pl_module)

    def log_and_clear(self, module: LightningModule) -> None:
        for name, value in self._means(self.sums).items():
            module.log(f"monitor/{name}", value, sync_dist=True)
        self.sums = torch.zeros_like(self.sums)

    def _means(self, sums: Tensor) -> dict[str, float]:
        columns = zip(self.names, summed(sums).tolist(), strict=True)
        return {name: total / count for name, (total, count) in columns if count}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": summed(self.sums).cpu(), "recent": summed(self.recent).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("sums", "recent"):
            saved = state.get(name, torch.zeros_like(self.sums))  # checkpoints once held `sums` alone
            setattr(self, name, saved.clone() if is_rank_zero() else torch.zeros_like(saved))
