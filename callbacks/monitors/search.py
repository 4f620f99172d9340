"""The base of monitors that read what a search for better plans found."""

from abc import abstractmethod
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor

from callbacks.monitors.steps import StepMonitor
from models.interfaces.probe_batch import EStep
from models.interfaces.probes import SearchProbe, find_probe


class SearchMonitor(StepMonitor):
    """One figure, the first of `names`: its mean over texts whose plan was searched for."""

    @abstractmethod
    def values(self, found: EStep) -> Tensor:
        """The figure of each text, (B,); not finite where it has none."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        probe = find_probe(pl_module, SearchProbe)
        if probe is not None and probe.e_step is not None:
            values = self.values(probe.e_step)
            self.add(self.names[0], values[values.isfinite()])

    def charts(self) -> dict[str, list[str]]:
        return {"search for plans": [f"monitor/{self.names[0]}$"]}
