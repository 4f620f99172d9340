"""The base of monitors that measure on held-out rows, after each validation and before a test."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Generator, Tensor

from models.functional.errors import require_at_least
from models.interfaces.probe_batch import ProbeBatch, rows_at
from models.interfaces.probes import find_probe

CHUNK = 64  # rows of a forward pass, and of a look between validations


class RowMonitor(Callback):
    """Measures a split's first `rows` rows: `monitor/<name>` in a validation, and before a test the module's `figures`.

    Every rank measures all of them: figures are the same on any number of ranks, exchanges span all rows, and probing
    forward passes, which are collective where weights are sharded, are made together. Averaged weights are used where there
    are any.
    offers: the protocol of the probe that a module has to have. cheap: whether one forward pass is enough, so that it can be
    measured more often than the training validates (`look`).
    """

    offers: type
    cheap: bool = False

    def __init__(self, rows: int = 256) -> None:
        require_at_least(1, rows=rows)
        self.rows = rows

    @abstractmethod
    def measure(self, probe: Any, rows: dict[str, Tensor], generator: Generator) -> dict[str, float]:
        """Figures by name."""

    def recorded(self, figures: dict[str, float]) -> dict[str, float]:
        """Those of a test that the record keeps."""
        return figures

    def look(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Figures of the first CHUNK validation rows, between two training steps; the training does not notice."""
        if not self._can_measure(trainer, module):
            return {}
        with training_left_alone(module):
            return self._figures(trainer, module, "val", min(CHUNK, self.rows))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._can_measure(trainer, pl_module):
            return
        with getattr(pl_module, "averaged", nullcontext)():
            figures = self._figures(trainer, pl_module, "val", self.rows)
        for name, value in figures.items():
            pl_module.log(f"monitor/{name}", value, sync_dist=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._can_measure(trainer, pl_module) and getattr(pl_module, "figures", None) is not None:
            pl_module.figures.add(self.recorded(self._figures(trainer, pl_module, "test", self.rows)))

    def _can_measure(self, trainer: Trainer, module: LightningModule) -> bool:
        return find_probe(module, self.offers) is not None and hasattr(trainer.datamodule, "rows")

    @torch.no_grad()
    def _figures(self, trainer: Trainer, module: Any, split: str, most: int) -> dict[str, float]:
        rows = first_rows(trainer, module, split, most)
        return self.measure(find_probe(module, self.offers), rows, Generator(device=module.device).manual_seed(0))


@contextmanager
def training_left_alone(module: LightningModule) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule's mode and the global random state are what they were."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def first_rows(trainer: Trainer, module: LightningModule, split: str, most: int) -> dict[str, Tensor]:
    """At most so many rows of a split, on the module's device."""
    columns = trainer.datamodule.rows[split].columns
    return {name: column[:most].to(module.device) for name, column in columns.items()}


def in_parts(
    measure: Callable[[dict[str, Tensor], ProbeBatch], Tensor], rows: dict[str, Tensor], batch: ProbeBatch
) -> Tensor:
    """`measure` of all rows and texts, CHUNK of them at a time."""
    parts = [slice(start, start + CHUNK) for start in range(0, len(batch.text), CHUNK)]
    return torch.cat([measure(rows_at(rows, part), batch.at(part)) for part in parts])
