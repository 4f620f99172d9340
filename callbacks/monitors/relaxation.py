"""Monitor 6: how near a relaxed choice is to the discrete one. The gradient is the relaxed one's: a low cosine biases it."""

from typing import Any

import torch.nn.functional as F
from lightning import LightningModule, Trainer

from callbacks.monitors.steps import StepMonitor
from models.interfaces.probes import RelaxationProbe, find_probe


class RelaxationMonitor(StepMonitor):
    """relaxation_cosine: cos(e_soft, e_hard); relaxation_distance: their L2 distance; means over all choices of the steps."""

    names = ("relaxation_cosine", "relaxation_distance")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        probe = find_probe(pl_module, RelaxationProbe)
        if probe is not None and probe.relaxation is not None:
            soft, hard = probe.relaxation
            self.add("relaxation_cosine", F.cosine_similarity(soft, hard, dim=-1))
            self.add("relaxation_distance", (soft - hard).norm(dim=-1))

    def charts(self) -> dict[str, list[str]]:
        return {"relaxation": ["monitor/relaxation_.*"]}
