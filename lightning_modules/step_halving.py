"""The step-halving baseline (SDTT): rounds in which the student learns to do two of its teacher's steps in one."""

import math

from torch import Generator, Tensor

from lightning_modules.staged_distill import StagedDistillModule
from lightning_modules.training.stages import Stages
from models.backbones.llada import LladaModel
from models.diffusion.sampler import MaskedDiffusionDecoder, Remasking
from models.flow.masked_student import Adapter, MaskedStudent
from models.flow.step_halving import halve_steps
from models.functional.errors import UsageError
from models.interfaces.decoder import Decoder
from models.interfaces.objective import Terms


class StepHalvingModule(StagedDistillModule):
    """A masked diffusion LM distilled to half, a quarter, ... of the forwards, down to one.

    start_forwards: forwards of the teacher's own sampler in the first round, a power of two; log2 of it rounds in all, the
        last one teaching one forward. In every round the teacher is the average that the one before left.
    adapter, lora_rank: see `MaskedStudent`. lr: peak of every round.
    """

    snapshots = ("average", "round_teacher")

    def __init__(
        self,
        teacher: LladaModel,
        *,
        start_forwards: int = 16,
        adapter: Adapter = "full",
        lora_rank: int = 16,
        lr: float = 1e-3,
        average_decay: float = 0.99,
        weight_decay: float = 0.0,
        forwards: tuple[int, ...] = (1, 2, 4, 8, 16),
        student_forwards: tuple[int, ...] = (1, 2, 4, 8),
        teacher_temperature: float = 1.0,
        teacher_remasking: Remasking = "random",
        seed: int = 0,
    ) -> None:
        rounds = math.log2(start_forwards) if start_forwards > 1 else 0.5
        if rounds != int(rounds):
            raise UsageError(f"module.start_forwards={start_forwards} must be a power of two above 1, such as 16")
        names = [f"to_{start_forwards >> (k + 1)}" for k in range(int(rounds))]
        super().__init__(
            MaskedStudent(teacher, adapter=adapter, lora_rank=lora_rank),
            Stages({name: {"share": 1 / rounds, "lr": lr} for name in names}, names),
            average_decay=average_decay,
            weight_decay=weight_decay,
            forwards=forwards,
            teacher_temperature=teacher_temperature,
            teacher_remasking=teacher_remasking,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["teacher"])
        self.student_forwards = tuple(student_forwards)
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
        options = {"temperature": self.teacher_temperature, "remasking": self.teacher_remasking}
        students = [MaskedDiffusionDecoder(self.student.body, n, **options) for n in self.student_forwards]
        for decoder in students:
            decoder.method, decoder.name = "student", "step halving"
        return [*self.teacher_decoders(), *students]
