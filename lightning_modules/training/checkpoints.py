"""Checkpoints of what trains: what is kept, how it is written, and whether one fits the module that reads it."""

import io
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn

from models.functional.errors import UsageError


def kept_state(state: Mapping[str, Tensor], names: Collection[str], *, step: int, lr: float) -> dict[str, Tensor]:
    """The weights of the names. Errors: UsageError where one is not finite, so that the checkpoint before stays the last."""
    kept = {name: weight for name, weight in state.items() if name in names}
    for name, weight in kept.items():
        if not torch.isfinite(weight).all():
            raise UsageError(
                f"{name} is not finite after step {step}: training diverged, and the checkpoint before it is kept; go on from "
                f"there (ckpt_path=last) or start again with a learning rate below {lr:g}"
            )
    return kept


class ReplacingCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one, then puts it in its place in one step.

    Lightning's own writes to the folder of temporary files and moves from there, which copies where that is another file
    system: a run that is killed then leaves half a file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):  # not a local file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch.save to a file hides why a write has failed
        torch.save(checkpoint, buffer)
        aside = path.with_name(f".{path.name}.partial")
        try:
            with aside.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def require_optimizer(checkpoint: str, own: str) -> None:
    """Errors: UsageError unless the checkpoint's optimizer is this run's."""
    if checkpoint != own:
        raise UsageError(
            f"the checkpoint was trained with module.optimizer={checkpoint}, whose state means nothing to {own}; "
            f"type module.optimizer={checkpoint} to go on"
        )


def require_weights(held: Mapping[str, Tensor], module: nn.Module, names: Collection[str]) -> None:
    """Errors: UsageError unless the checkpoint holds the module's parameters of these names in their shapes."""
    wanted = dict(module.named_parameters())
    for name in sorted(names):
        if name not in held:
            raise UsageError(f"the checkpoint has no {name}: it was written by another module or architecture")
        if held[name].shape != wanted[name].shape:
            raise UsageError(
                f"the checkpoint's {name} has shape {tuple(held[name].shape)}, this model's {tuple(wanted[name].shape)}; "
                "use the model and module options it was trained with (its run folder holds them in .hydra/config.yaml)"
            )
