"""Monitor 7: the gradient that reaches whoever chooses the plans to train on, from what these plans are for.

Near 0 the text does not train the plans; a sudden rise is an explosion.
"""

from typing import Any

from lightning import LightningModule, Trainer
from torch.optim import Optimizer

from callbacks.monitors.steps import StepMonitor
from models.functional.ranks import rank_mean
from models.interfaces.probes import PlannerProbe, find_probe


class GradientMonitor(StepMonitor):
    """planner_gradient: L2 norm of a text's gradient, mean over texts and steps; planner_gradient_max: the largest step's."""

    names = ("planner_gradient",)

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.recent_largest = 0.0  # since the last validation, and since the last `take_recent`

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        probe = find_probe(pl_module, PlannerProbe)
        own = None if probe is None else probe.take_planner_gradient()
        if own is None:
            return
        norm = rank_mean(own)
        self.add("planner_gradient", norm.unsqueeze(0))
        self.largest = _larger(self.largest, norm.item())
        self.recent_largest = _larger(self.recent_largest, norm.item())

    def take_recent(self) -> dict[str, float]:
        found = super().take_recent()
        largest = {"planner_gradient_max": self.recent_largest} if found else {}
        self.recent_largest = 0.0
        return found | largest

    def log_and_clear(self, module: LightningModule) -> None:
        if self.sums[0, 1]:
            module.log("monitor/planner_gradient_max", self.largest, sync_dist=True)
        self.largest = 0.0
        super().log_and_clear(module)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"largest": self.largest, "recent_largest": self.recent_largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.largest, self.recent_largest = state["largest"], state.get("recent_largest", 0.0)

    def charts(self) -> dict[str, list[str]]:
        return {"planner's gradient": ["monitor/planner_gradient.*"]}


def _larger(known: float, value: float) -> float:
    """The larger of two; NaN where the new one is, for `max` would lose it."""
    return max(known, value) if value == value else value
