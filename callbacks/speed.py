"""Speed of a training: tokens and texts per second, and Model FLOPs Utilisation."""

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import get_available_flops

from models.functional.errors import UsageError
from models.functional.next_token import token_counts

DTYPES = {
    "16-mixed": torch.float16,
    "16-true": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
}


class Speed(Callback):
    """Logs speed/tokens_per_s, speed/samples_per_s and, where it can be known, speed/mfu, every trainer.log_every_n_steps.

    Of training alone, over all ranks, with the reading of batches and without validation. Tokens are those of the texts read.
    MFU is Model FLOPs Utilisation (Chowdhery et al., PaLM, 2022): a module's `flops_of_step`, the products of its forward and
    backward passes, over what its devices could do. peak_flops: FLOP/s of one device; None takes what Lightning knows of its
    kind at the trainer's precision. Neither a CPU nor a module that does not count its FLOPs has an MFU.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise UsageError(
                f"callbacks.speed.peak_flops={peak_flops} must be above 0; null is what is known of the device"
            )
        self.peak_flops = peak_flops
        self._per_batch: float | None = None
        self._peak: float | None = None
        self._mark: float  # when the last batch ended

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._peak = self.peak_flops or peak_of(pl_module.device, str(trainer.precision))
        self._per_batch = None
        self._begin()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        if self._per_batch is None and self._peak is not None and hasattr(pl_module, "flops_of_step"):
            self._per_batch = pl_module.flops_of_step(batch)
            self.leave_out()  # counting is no training

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, torch.Tensor], *_: Any
    ) -> None:
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now
        self._batches += 1
        self._samples += len(next(iter(batch.values())))
        self._tokens += token_counts(batch)
        if trainer.log_every_n_steps and self._batches >= trainer.log_every_n_steps and self._seconds > 0:
            for name, value in self.rates(trainer.world_size).items():
                pl_module.log(f"speed/{name}", value, prog_bar=name != "samples_per_s", rank_zero_only=True)
            self._begin()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.leave_out()

    def leave_out(self) -> None:
        """Do not count the time since the last batch: it was no training."""
        self._mark = time.perf_counter()

    def rates(self, ranks: int) -> dict[str, float]:
        """Of the batches since the last time."""
        found = {
            "tokens_per_s": self._tokens * ranks / self._seconds,
            "samples_per_s": self._samples * ranks / self._seconds,
        }
        if self._per_batch is not None and self._peak is not None:
            found["mfu"] = self._per_batch * self._batches / self._seconds / self._peak
        return found

    def _begin(self) -> None:
        self._batches = self._samples = self._tokens = 0
        self._seconds, self._mark = 0.0, time.perf_counter()


def peak_of(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the maker states for a GPU at a precision; None of a CPU and of a kind that Lightning does not know."""
    if device.type != "cuda":
        return None
    found = get_available_flops(device, DTYPES.get(precision, torch.float32))
    return None if found is None else float(found)
