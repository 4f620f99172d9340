"""Saves the trained part of a student when training ends."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from models.backbones.student_files import save_student


class ExportStudent(Callback):
    """Writes `folder` (student.safetensors + student.json) after training, with the averaged weights where there are any.

    teacher: where the base came from, noted in student.json so that it can be found again.
    """

    def __init__(self, folder: str, teacher: str | None = None, notes: dict | None = None) -> None:
        self.folder, self.teacher, self.notes = Path(folder), teacher, notes or {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        student = getattr(pl_module, "student", None)
        if student is not None and trainer.is_global_zero and not trainer.fast_dev_run:
            save_student(student, self.folder, {"teacher": self.teacher, **self.notes})
