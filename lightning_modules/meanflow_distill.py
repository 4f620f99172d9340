"""MeanFlowDistillModule: the common part of all distillations of a masked diffusion LM into a few-step generator.

Two flows are built on it: `module=logit_flow` (logit_flow.py) averages the teacher's logits along its masking path, and
`module=noisy_mask_flow` (noisy_mask_flow.py) maps noise to whole texts. docs/meanflow.md compares them.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning_modules.base import LeapModule
from models.backbones.llada import LladaModel
from models.diffusion.commit_rules import build_rules
from models.diffusion.sampler import rule_decoders, scheduled_decoders
from models.flow.student import Student
from models.flow.student_files import FORMAT, base_fingerprint, save_student, save_whole_student
from models.functional.errors import UsageError
from models.functional.weights import copy_weights, number_of_weights, trainable_weights
from models.interfaces.decoder import Decoder
from models.interfaces.masked_sampling import MaskedSampling
from models.interfaces.optimizer import OptimizerName


class MeanFlowDistillModule(LeapModule):
    """A student over a frozen teacher, which is the student's own base: one copy in memory.

    teacher_sampling: the teacher's rows in the final table.
    """

    def __init__(
        self,
        student: Student,
        *,
        lr: float,
        weight_decay: float,
        warmup_steps: int,
        teacher_sampling: MaskedSampling,
        seed: int,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps, seed=seed, optimizer=optimizer)
        self.student, self.teacher_sampling = student, teacher_sampling
        self.teacher_rules = build_rules(teacher_sampling.commit_rules, "module.teacher_commit_rules")

    def require_precision(self, precision: str) -> None:
        """Weights that train are float32, whatever the base's precision: averages and derivatives need it."""
        if precision not in ("32-true", "64-true", "bf16-mixed"):
            raise UsageError(
                f"trainer.precision={precision}: what trains of a student is float32; type "
                "trainer.precision=bf16-mixed (or 32-true), and to save memory keep the base in half precision "
                "(model.dtype=bfloat16)"
            )

    def optimizer_step(self, *args, **kwargs) -> None:
        """Projects in the same call: averages and checkpoints must not hold a negative gate."""
        super().optimizer_step(*args, **kwargs)
        self.student.project_weights()

    def trains_additions(self) -> bool:
        """True: averages, snapshots and derivatives need the student's own weights whole on every rank."""
        return True

    @property
    def teacher(self) -> LladaModel:
        return self.student.base

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint |= {"base": base_fingerprint(self.teacher), "student_format": FORMAT}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get("student_format") != FORMAT:
            raise UsageError(
                "the checkpoint's student was trained by another version, with other layers; train it again"
            )
        if checkpoint.get("base") != base_fingerprint(self.teacher):
            raise UsageError(
                "the checkpoint's student was trained on another teacher; use the options and the seed of its run "
                "(its folder holds them in .hydra/config.yaml), or teacher.path=<folder of its teacher>"
            )

    def start_from(self, student: Student) -> None:
        """Take the weights of a trained student of the same teacher. Raises UsageError where the options differ."""
        if type(student) is not type(self.student) or student.options != self.student.options:
            raise UsageError(
                f"student_path holds a {type(student).__name__} with {student.options}, this run wants a "
                f"{type(self.student).__name__} with {self.student.options}; give both the same module= and module options"
            )
        copy_weights(self.student, student.trainable())

    def save_student(self, folder: str | Path, notes: dict[str, Any] | None = None) -> Path:
        """Write the trained weights alone, averaged where there is an average; notes: of student.json."""
        # a run that is resumed after its last step does not train, so the student may not have its average yet
        with getattr(self, "averaged", nullcontext)():
            return save_student(self.student, folder, notes)

    def export(self, folder: str | Path, tokenizer: Any = None, merged: bool = False) -> Path:
        """Write the student, averaged where there is an average, and its teacher into one folder."""
        with getattr(self, "averaged", nullcontext)():
            return save_whole_student(self.student, folder, tokenizer)

    def decoder_figures(self, k: int) -> dict[str, dict[str, float | None]]:
        """How many weights of a student train, and how many its base has."""
        found, decoders = super().decoder_figures(k), self.decoders()
        if k < len(decoders) and decoders[k].method == "student":  # further ones are the corpus' controls
            trained = number_of_weights(trainable_weights(self.student).values())
            base = number_of_weights(self.teacher.parameters())
            found["cost"] |= {"trained_weights": trained, "base_weights": base, "trained_share": trained / base}
        return found

    def teacher_decoders(self) -> list[Decoder]:
        """Of scheduled forward passes, and of the rules that commit by confidence."""
        how = self.teacher_sampling
        if not (how.ends_last or self.teacher_rules):
            return [*scheduled_decoders(self.teacher, how)]
        data = self.trainer.datamodule
        scheduled = scheduled_decoders(self.teacher, how, data.end_ids())
        rules = rule_decoders(self.teacher, self.teacher_rules, how, data.response_length, data.end_ids())
        return [*scheduled, *rules]
