"""The step-halving baseline (SDTT): rounds in which the student learns to do two of its teacher's steps in one."""

from dataclasses import asdict, replace
from typing import Any, ClassVar

from torch import Generator, Tensor

from lightning_modules.staged_distill import StagedDistillModule
from lightning_modules.training.stages import Stages
from models.backbones.llada import LladaModel
from models.diffusion.sampler import MaskedDiffusionDecoder
from models.flow.masked_student import MaskedStudent
from models.flow.options import StepHalvingOptions
from models.flow.step_halving import halve_steps
from models.interfaces.decoder import Decoder
from models.interfaces.objective import Terms


class StepHalvingModule(StagedDistillModule):
    """A masked diffusion LM distilled to half, a quarter, ... of the forward passes, down to one (`StepHalvingOptions`).

    There are log2(start_forwards) rounds; the last one teaches one forward pass. The teacher of every round is the average
    that the round before left.
    """

    options_class: ClassVar[type] = StepHalvingOptions
    snapshots = ("average", "round_teacher")

    def __init__(self, teacher: LladaModel, options: StepHalvingOptions | None = None, **changes: Any) -> None:
        o = replace(options or StepHalvingOptions(), **changes)
        rounds = o.start_forwards.bit_length() - 1
        names = [f"to_{o.start_forwards >> (k + 1)}" for k in range(rounds)]
        super().__init__(
            MaskedStudent(teacher, adapter=o.adapter, lora_rank=o.lora_rank),
            Stages({name: {"share": 1 / rounds, "lr": o.lr} for name in names}, names),
            average_decay=o.average_decay,
            weight_decay=o.weight_decay,
            teacher_sampling=o.teacher_sampling,
            seed=o.seed,
        )
        self.save_hyperparameters(asdict(o))
        self.options = o
        self.round_teacher: dict[str, Tensor] = {}

    def on_stage_begin(self, stage: str) -> None:
        self.round_teacher = self.student.trainable()

    def stage_terms(self, stage: str, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        step = 1 / (2 * int(stage.removeprefix("to_")))
        return halve_steps(self.student, self.network(self.round_teacher), batch, step, generator)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The average's divergence on held-out rows, in the round whose steps were the last."""
        if self.stage_begun is None:  # a validation before the first step has no round's teacher
            return
        generator = self.step_generator(batch_idx, stream=1, epoch=0)
        with self.averaged():
            terms = self.stage_terms(self.stage_begun, batch, 1.0, generator)
        self.log("val/loss", terms.loss, prog_bar=True, batch_size=len(batch["input_ids"]), sync_dist=True)

    def decoders(self) -> list[Decoder]:
        options: dict[str, Any] = {
            "temperature": self.options.teacher_temperature,
            "remasking": self.options.teacher_remasking,
        }
        students = [MaskedDiffusionDecoder(self.student.body, n, **options) for n in self.options.student_forwards]
        for decoder in students:
            decoder.method, decoder.name = "student", "step halving"
        return [*self.teacher_decoders(), *students]
