"""What a run that goes on from a checkpoint does with options that have changed since."""

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from models.functional.errors import UsageError
from reporting.console import report_console

OPTIONS = "options"  # key of a checkpoint
# parts of the optimiser's state, which comes from the checkpoint
OF_THE_OPTIMIZER = ("module.lr", "module.weight_decay")
ALSO_IN_OLD_CHECKPOINTS = (*OF_THE_OPTIMIZER, "module.warmup_steps")


class ResumedOptions(Callback):
    """Keeps the options of a training in its checkpoints, and says which ones a resumed run has changed.

    options: {name on the command line: plain value}. Errors: UsageError for other stages than those of the checkpoint.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[OPTIONS] = dict(self.options)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        sentences = [*self._changes(checkpoint), *_at_the_end(trainer, checkpoint)]
        if trainer.is_global_zero:
            for sentence in sentences:
                report_console().print(f"ckpt_path: {sentence}", highlight=False, markup=False, soft_wrap=True)

    def _changes(self, checkpoint: Mapping[str, Any]) -> list[str]:
        before = _options_of(checkpoint)
        changed = [name for name in self.options if name in before and before[name] != self.options[name]]
        for name in changed:
            if name.startswith("module.stages."):
                raise UsageError(
                    f"{name}={self.options[name]} cannot change between a run's stages; type {name}={before[name]} to go on, "
                    "or start again with student_path=<its student>"
                )
        kept = [name for name in changed if name in OF_THE_OPTIMIZER]
        new = [
            f"{name}={_typed(self.options[name])} (was {_typed(before[name])})" for name in changed if name not in kept
        ]
        old = [f"{name}={before[name]} (not {self.options[name]})" for name in kept]
        self.options |= {name: before[name] for name in kept}
        sentences = []
        if old:
            sentences.append(
                f"the run goes on with the optimiser's state, so {', '.join(old)} counts; for other values start a new run"
            )
        if new:
            sentences.append(
                f"from here on {', '.join(new)} counts; the run is then not the exact continuation of the one before"
            )
        return sentences


def _typed(value: Any) -> Any:
    return "null" if value is None else value


def _options_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    if OPTIONS in checkpoint:
        return checkpoint[OPTIONS]
    own = {f"module.{name}": value for name, value in checkpoint.get("hyper_parameters", {}).items()}
    return {name: own[name] for name in ALSO_IN_OLD_CHECKPOINTS if name in own}


def _at_the_end(trainer: Trainer, checkpoint: Mapping[str, Any]) -> list[str]:
    step = checkpoint["global_step"]
    if trainer.max_steps < 0 or step < trainer.max_steps:
        return []
    if "stages" in checkpoint:  # planned for a number of steps
        more = "its stages are complete; type student_path=<its student> without ckpt_path to train on from there"
    else:
        more = f"type trainer.max_steps=<more than {step}> to go on"
    return [f"the run is at its last step, {step}; nothing is trained, only compared again; {more}"]
