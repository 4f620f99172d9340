"""Looks at a training's figures a few times and says what looks wrong: the anomaly, the evidence, what to try."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from callbacks.monitors.rows import RowMonitor
from callbacks.monitors.steps import StepMonitor
from callbacks.speed import Speed
from reporting.console import report_console
from reporting.health_rules import RULES, Look, Rule
from reporting.keys import current_names

READ = ("monitor/", "val/")
LOOKS = 10  # at least, in a training of so many steps or more


class Health(Callback):
    """Prints one line for each anomaly that is new, and writes it to TensorBoard as text.

    A look is taken after each validation, and between validations wherever a tenth of the training has passed without one. A
    look has only figures that were measured since the look before: those that a validation logged, means over training steps
    (`StepMonitor`), and measurements of a few held-out rows (`RowMonitor.look`), which change nothing about the training.
    An anomaly that goes away and comes back is printed again. Looks and anomalies are in checkpoints.
    """

    def __init__(self, rules: tuple[Rule, ...] = RULES, console: Console | None = None) -> None:
        self.rules, self.console = rules, console
        self.looks: list[Look] = []
        self.present: dict[str, str] = {}  # anomaly -> evidence
        self.last_step = 0  # of the last look
        self._logged: dict[str, Tensor] = {}

    # -- when ---------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # not after the batch before: a validation may have followed that
        if self._due(trainer):
            self._judge(trainer, self._measured(trainer, pl_module))
            for callback in trainer.callbacks:
                if isinstance(callback, Speed):
                    callback.leave_out()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due(trainer):
            self._judge(trainer, self._measured(trainer, pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        # what this validation logged is another tensor than what was there before
        new = {n: v for n, v in trainer.callback_metrics.items() if n.startswith(READ) and v is not self._logged.get(n)}
        of_steps = {name for monitor in trainer.callbacks if isinstance(monitor, StepMonitor) for name in monitor.names}
        # a name that both log is the monitor's: "monitor/" comes before "val/"
        named = {name.split("/", 1)[1]: float(value) for name, value in sorted(new.items(), reverse=True)}
        figures = {name: value for name, value in named.items() if name.removesuffix("_max") not in of_steps}
        self._judge(trainer, figures | self._measured(trainer, pl_module))

    def _due(self, trainer: Trainer) -> bool:
        steps = trainer.estimated_stepping_batches
        known = steps != float("inf") and not trainer.fast_dev_run
        return known and trainer.global_step - self.last_step >= max(1, int(steps) // LOOKS)

    # -- what ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def _measured(trainer: Trainer, module: LightningModule) -> Look:
        """What monitors measure without a validation; every rank takes part."""
        figures: Look = {}
        for monitor in trainer.callbacks:
            if isinstance(monitor, StepMonitor):
                figures |= monitor.take_recent()
            elif isinstance(monitor, RowMonitor) and monitor.cheap:
                figures |= monitor.look(trainer, module)
        return figures

    def _judge(self, trainer: Trainer, figures: Look) -> None:
        steps = max(1.0, float(trainer.estimated_stepping_batches))
        self.looks.append(figures | {"progress": trainer.global_step / steps})
        self.last_step = trainer.global_step
        found = {rule.name: (rule.evidence(self.looks), rule.action) for rule in self.rules}
        found = {name: pair for name, pair in found.items() if pair[0] is not None}
        new = {name: pair for name, pair in found.items() if name not in self.present}
        self.present = {name: evidence for name, (evidence, _) in found.items()}
        if trainer.is_global_zero:
            for name, (evidence, action) in new.items():
                self._report(trainer, name, evidence, action)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.looks and not self.present:
            self._print(f"health: nothing wrong at the last of {len(self.looks)} looks")

    # -- printing -----------------------------------------------------------------------------------------------------

    def _report(self, trainer: Trainer, name: str, evidence: str, action: str) -> None:
        self._print(f"[bold yellow]health: {escape(name)}[/] ({escape(evidence)}). Try: {escape(action)}.")
        text = f"**{name}**\n\nevidence: {evidence}\n\nwhat to try: {action}"
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                logger.experiment.add_text("health", text, trainer.global_step)

    def _print(self, line: str) -> None:
        (self.console or report_console()).print(line, highlight=False, soft_wrap=True)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        looks = [dict(look) for look in self.looks]
        return {"looks": looks, "present": dict(self.present), "last_step": self.last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.looks, self.present = [current_names(look) for look in state["looks"]], dict(state["present"])
        self.last_step = state.get("last_step", 0)
