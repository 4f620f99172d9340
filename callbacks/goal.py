"""Tokens and seconds that a training needed to reach a validation NLL, and its curve of validation NLLs."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer

from models.functional.next_token import token_counts


class TrainingGoal(Callback):
    """Figures goal_tokens and goal_seconds: spent when a validation NLL, exact or bound, is first at most `below` nats a token.

    A training that does not reach the goal has neither. Tokens are all that were read, whichever of them an objective scores,
    over all ranks; seconds are those of training steps alone.
    The module's `curve` gets a point for each validation: steps, tokens, nll and, where it is known, the data's own nll_truth.
    """

    monitors = ("val/nll", "val/nll_bound")

    def __init__(self, below: float) -> None:
        self.below = below
        self.tokens, self.seconds = 0, 0.0
        self.reached: dict[str, float] = {}
        self.curve: dict[str, list[float]] = {}
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.seconds += time.perf_counter() - self._started
        self.tokens += token_counts(batch) * trainer.world_size

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = [float(trainer.callback_metrics[name]) for name in self.monitors if name in trainer.callback_metrics]
        if not known or not self.tokens:
            return
        if known[0] <= self.below and not self.reached:
            self.reached = {"goal_tokens": self.tokens, "goal_seconds": self.seconds}
        point = {"steps": trainer.global_step, "tokens": self.tokens, "nll": known[0]}
        if "val/nll_truth" in trainer.callback_metrics:
            point["nll_truth"] = float(trainer.callback_metrics["val/nll_truth"])
        for name, value in point.items():
            self.curve.setdefault(name, []).append(value)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.tokens and getattr(pl_module, "figures", None) is not None:
            pl_module.figures.add({**self.reached, "train_tokens": self.tokens, "train_seconds": self.seconds})
            pl_module.curve = self.curve

    def state_dict(self) -> dict[str, Any]:
        curve = {name: list(values) for name, values in self.curve.items()}
        return {"tokens": self.tokens, "seconds": self.seconds, "reached": dict(self.reached), "curve": curve}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.seconds, self.reached = state["tokens"], state["seconds"], dict(state["reached"])
        self.curve = {name: list(values) for name, values in state.get("curve", {}).items()}
