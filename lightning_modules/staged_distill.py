"""A distillation in stages, with a running average of the weights, which the targets are computed with.

All stages are one training: the step number decides the stage. So there is one progress bar and one checkpoint, and
`ckpt_path=last` resumes in any stage.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Generator, Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.meanflow_distill import MeanFlowDistillModule
from lightning_modules.training.stages import Stages
from models.flow.student import Student
from models.functional.errors import UsageError
from models.functional.weights import copy_weights, update_average
from models.interfaces.objective import Terms


class StagedDistillModule(MeanFlowDistillModule):
    """Subclasses define the loss of each stage (`stage_terms`). A stage starts from the average that the one before left.

    average_decay: weight of the past in the running average; less at the start of a stage.
    """

    snapshots: tuple[str, ...] = ("average",)  # attributes that hold other values of the student's weights

    def __init__(self, student: Student, stages: Stages, *, average_decay: float, **options: Any) -> None:
        if not 0 <= average_decay < 1:
            raise UsageError(f"module.average_decay={average_decay} must be at least 0 and less than 1")
        super().__init__(student, lr=max(stage.lr for stage in stages.all), warmup_steps=0, **options)
        self.stages, self.average_decay = stages, average_decay
        self.stage_begun: str | None = None
        self.average: dict[str, Tensor] = {}
        self.average_steps = 0
        self.resumed_steps: int | None = None

    @abstractmethod
    def stage_terms(self, stage: str, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        """The loss of a step of `stage`; progress: the share of the stage that is over, 0 to 1."""

    def on_stage_begin(self, stage: str) -> None:
        """Called when the student has the weights that the stage starts from."""

    # -- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        stage, progress = self.stages.at(self.global_step)
        if stage.name != self.stage_begun:
            self._begin(stage.name)
        terms = self.stage_terms(stage.name, batch, progress, self.step_generator(batch_idx))
        rows = len(batch["input_ids"])
        self.log("train/loss", terms.loss, prog_bar=True, batch_size=rows)
        for name, value in terms.raw.items():
            self.log(f"train/{name}", value, batch_size=rows)
        return self.refuse_nan(terms.loss)

    def _begin(self, stage: str) -> None:
        if self.stage_begun is not None:
            copy_weights(self.student, self.average)
            self.optimizers().optimizer.state.clear()
        self.on_stage_begin(stage)
        self.average, self.average_steps, self.stage_begun = self.student.trainable(), 0, stage

    def lr_schedule(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        self.stages.plan(steps)
        return LambdaLR(optimizer, lambda step: self.stages.lr(step) / self.lr)

    def optimizer_step(self, *args, **kwargs) -> None:
        """Updates the average in the same call: a checkpoint must not hold a step without its average."""
        super().optimizer_step(*args, **kwargs)
        self.average_steps += 1
        update_average(self.average, self.student, self.average_decay, self.average_steps)

    # -- weights ----------------------------------------------------------------------------------------------------

    def network(self, weights: dict[str, Tensor]) -> Callable[..., Tensor]:
        """The student evaluated with other weights."""
        return partial(self.student.with_weights, weights)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the student has its average weights."""
        raw = self.student.trainable()
        copy_weights(self.student, self.average)
        try:
            yield
        finally:
            copy_weights(self.student, raw)

    def on_fit_start(self) -> None:
        """Moves snapshots to the device, since checkpoints are read before. Refuses to resume with another number of steps."""
        for name in self.snapshots:
            setattr(self, name, {key: weight.to(self.device) for key, weight in getattr(self, name).items()})
        steps = self.stages.all[-1].last
        if self.resumed_steps not in (None, steps):
            raise UsageError(
                f"the checkpoint's stages were planned for {self.resumed_steps} steps, this run has {steps}; "
                f"type trainer.max_steps={self.resumed_steps} to go on, or start again with student_path=<its student>"
            )

    def on_train_end(self) -> None:
        self._use_average()

    def on_test_start(self) -> None:
        self._use_average()

    def _use_average(self) -> None:
        if self.average:  # a student that was read from disk comes without one
            copy_weights(self.student, self.average)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def stage_state(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights, as plain types and tensors. Subclasses add to it."""
        state = {"stage": self.stage_begun, "average_steps": self.average_steps, "steps": self.stages.all[-1].last}
        return state | {name: getattr(self, name) for name in self.snapshots}

    def load_stage_state(self, state: dict[str, Any]) -> None:
        self.stage_begun, self.average_steps, self.resumed_steps = (
            state["stage"],
            state["average_steps"],
            state["steps"],
        )
        for name in self.snapshots:
            setattr(self, name, dict(state[name]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stages"] = self.stage_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.load_stage_state(checkpoint["stages"])
