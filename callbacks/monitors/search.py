"""The base of monitors that read what a search for better plans reports."""

from abc import abstractmethod
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor

from callbacks.monitors.steps import StepMonitor
from models.interfaces.probe_batch import EStep
from models.interfaces.probes import SearchesPlans


class SearchMonitor(StepMonitor):
    """One figure, the first of `names`, of every text that was searched for since the last validation."""

    @abstractmethod
    def values(self, found: EStep) -> Tensor:
        """(B,), not finite where there is none."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if isinstance(pl_module, SearchesPlans) and pl_module.e_step is not None:
            values = self.values(pl_module.e_step)
            self.add(self.names[0], values[values.isfinite()])

    def charts(self) -> dict[str, list[str]]:
        return {"search for plans": [f"monitor/{self.names[0]}$"]}
