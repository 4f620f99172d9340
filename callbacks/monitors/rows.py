"""The base of monitors that measure on held-out rows, after each validation and before a test."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Generator, Tensor

from models.interfaces.probe_batch import ProbeBatch, rows_at
from models.interfaces.probes import find_probe

CHUNK = 64  # rows of a forward


class RowMonitor(Callback):
    """Measures the split's first `rows` rows: `monitor/<name>` in a validation, and before a test the module's `figures`.

    Every rank measures all of them: figures are the same on any number of ranks, exchanges span all rows, and probing
    forwards, which are collective where weights are sharded, are made together. Averaged weights are used where there are any.
    offers: the protocol of the probe that a module has to have.
    """

    offers: type

    def __init__(self, rows: int = 256) -> None:
        self.rows = rows

    @abstractmethod
    def measure(self, probe: Any, rows: dict[str, Tensor], generator: Generator) -> dict[str, float]:
        """Figures by name."""

    def recorded(self, figures: dict[str, float]) -> dict[str, float]:
        """Those of a test that the record keeps."""
        return figures

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._can_watch(trainer, pl_module):
            return
        with getattr(pl_module, "averaged", nullcontext)():
            figures = self._figures(trainer, pl_module, "val")
        for name, value in figures.items():
            pl_module.log(f"monitor/{name}", value, sync_dist=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._can_watch(trainer, pl_module) and getattr(pl_module, "figures", None) is not None:
            pl_module.figures.add(self.recorded(self._figures(trainer, pl_module, "test")))

    def _can_watch(self, trainer: Trainer, module: LightningModule) -> bool:
        return find_probe(module, self.offers) is not None and hasattr(trainer.datamodule, "rows")

    @torch.no_grad()
    def _figures(self, trainer: Trainer, module: Any, split: str) -> dict[str, float]:
        rows = first_rows(trainer, module, split, self.rows)
        return self.measure(find_probe(module, self.offers), rows, Generator(device=module.device).manual_seed(0))


def first_rows(trainer: Trainer, module: LightningModule, split: str, most: int) -> dict[str, Tensor]:
    """At most so many rows of a split, on the module's device."""
    columns = trainer.datamodule.rows[split].columns
    return {name: column[:most].to(module.device) for name, column in columns.items()}


def in_parts(
    measure: Callable[[dict[str, Tensor], ProbeBatch], Tensor], rows: dict[str, Tensor], batch: ProbeBatch
) -> Tensor:
    """What `measure` says of rows and texts, a few at a time."""
    parts = [slice(start, start + CHUNK) for start in range(0, len(batch.text), CHUNK)]
    return torch.cat([measure(rows_at(rows, part), batch.at(part)) for part in parts])
