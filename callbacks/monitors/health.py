"""Reads what the monitors log and says when a training looks sick: the anomaly, the evidence, what to try."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.markup import escape

from reporting.console import report_console
from reporting.health_rules import RULES, Look, Rule

READ = ("monitor/", "val/")


class Health(Callback):
    """After each validation of a training: one line for each anomaly that is new, in the console and as TensorBoard text.

    An anomaly that goes away and comes back is said again. What was seen and said travels in checkpoints.
    """

    def __init__(self, rules: tuple[Rule, ...] = RULES, console: Console | None = None) -> None:
        self.rules, self.console = rules, console
        self.looks: list[Look] = []
        self.present: dict[str, str] = {}  # anomaly -> evidence

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self.looks.append(self._look(trainer))
        found = {rule.name: (rule.evidence(self.looks), rule.action) for rule in self.rules}
        found = {name: pair for name, pair in found.items() if pair[0] is not None}
        new = {name: pair for name, pair in found.items() if name not in self.present}
        self.present = {name: evidence for name, (evidence, _) in found.items()}
        if trainer.is_global_zero:
            for name, (evidence, action) in new.items():
                self._say(trainer, name, evidence, action)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.looks and not self.present:
            self._print(f"health: nothing wrong at the last of {len(self.looks)} looks")

    @staticmethod
    def _look(trainer: Trainer) -> Look:
        steps = max(1.0, float(trainer.estimated_stepping_batches))
        known = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(READ)}
        named = {name.split("/", 1)[1]: value for name, value in sorted(known.items(), reverse=True)}
        return named | {"progress": trainer.global_step / steps}

    def _say(self, trainer: Trainer, name: str, evidence: str, action: str) -> None:
        self._print(f"[bold yellow]health: {escape(name)}[/] ({escape(evidence)}). Try: {escape(action)}.")
        text = f"**{name}**\n\nevidence: {evidence}\n\nwhat to try: {action}"
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                logger.experiment.add_text("health", text, trainer.global_step)

    def _print(self, line: str) -> None:
        (self.console or report_console()).print(line, highlight=False, soft_wrap=True)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"looks": [dict(look) for look in self.looks], "present": dict(self.present)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.looks, self.present = [dict(look) for look in state["looks"]], dict(state["present"])
