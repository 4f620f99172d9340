"""Saves what was trained when training ends."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer


class ExportStudent(Callback):
    """Writes `folder` (student.safetensors + student.json) after training, with the averaged weights where there are any.

    teacher: where the base came from, noted in student.json (a folder with its absolute path) so that it can be found again.
    """

    def __init__(self, folder: str, teacher: str | None = None, notes: dict | None = None) -> None:
        self.folder, self.teacher, self.notes = Path(folder), teacher, notes or {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if hasattr(pl_module, "save_student") and trainer.is_global_zero and not trainer.fast_dev_run:
            here = self.teacher is not None and Path(self.teacher).is_dir()
            teacher = str(Path(self.teacher).absolute()) if here else self.teacher
            pl_module.save_student(self.folder, {"teacher": teacher, **self.notes})


class ExportModel(Callback):
    """Writes `folder` after training: a plain folder for transformers or, of a model with adapters, one for peft.

    merged: of a model with adapters, also write `<folder>_merged`, a plain model for transformers.
    """

    def __init__(self, folder: str, merged: bool = False) -> None:
        self.folder, self.merged = Path(folder), merged

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)
        pl_module.export(self.folder, tokenizer)
        if self.merged:
            pl_module.export(self.folder.with_name(self.folder.name + "_merged"), tokenizer, merged=True)
