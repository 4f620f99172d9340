"""Students on disk: the trained part alone (safetensors), beside a small JSON file with the fingerprint of its base."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.backbones.checkpoint_files import staging_folder
from models.backbones.llada import LladaModel
from models.backbones.masked_from_causal import MaskedFromCausal, load_masked
from models.flow.masked_student import MaskedStudent
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.prefix_student import PrefixStudent
from models.flow.student import Student
from models.functional.errors import UsageError
from models.functional.weights import trainable_weights, weights_fingerprint

FORMAT = "leap-student-3"
TEACHER = "teacher"  # folder of the base inside the student's folder
KINDS = {"logit": PrefixStudent, "noisy_mask": NoisyMaskStudent, "masked": MaskedStudent}


def base_fingerprint(base: LladaModel) -> str:
    """See `weights_fingerprint`; where weights are split over ranks, every rank has to call it."""
    weights = dict(base.state_dict())
    if isinstance(base, MaskedFromCausal):
        weights["mask_embedding"] = base.mask_embedding  # its start is no part of the state_dict
    return weights_fingerprint(weights)


def save_student(student: Student, folder: str | Path, notes: dict | None = None) -> Path:
    """Write the trained part to `folder` (student.safetensors, student.json); a half-written folder never appears."""
    folder = Path(folder)
    with staging_folder(folder) as staging:
        _write(student, staging, notes)
    return folder


def save_whole_student(student: Student, folder: str | Path, tokenizer=None) -> Path:
    """The same with its base in the folder, so that `load_whole_student` needs nothing else."""
    folder = Path(folder)
    with staging_folder(folder) as staging:
        student.base.save_pretrained(staging / TEACHER)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging / TEACHER)
        _write(student, staging, {"teacher": TEACHER})
    return folder


def _write(student: Student, folder: Path, notes: dict | None) -> None:
    weights = {name: p.detach().cpu().contiguous() for name, p in trainable_weights(student).items()}
    description = {
        "format": FORMAT,
        "kind": next(kind for kind, student_class in KINDS.items() if type(student) is student_class),
        "base": base_fingerprint(student.base),
        "options": student.options,
        "notes": notes or {},
    }
    save_file(weights, folder / "student.safetensors")
    (folder / "student.json").write_text(json.dumps(description, indent=2) + "\n")


def is_student(folder: str | Path) -> bool:
    return (Path(folder) / "student.json").is_file()


def read_student(folder: str | Path) -> dict:
    """The student.json of a saved student. Raises UsageError when the folder is not one."""
    path = Path(folder) / "student.json"
    if not path.is_file():
        raise UsageError(f"{folder} holds no student (student.json is missing); type student_path=<run folder>/student")
    description = json.loads(path.read_text())
    if description.get("format") != FORMAT or description.get("kind") not in KINDS:
        raise UsageError(
            f"{path} is of format {description.get('format')!r}; this version reads {FORMAT!r}: train it again"
        )
    return description


def teacher_folder(folder: str | Path) -> str | None:
    """Where the base of a student lies: in its folder, or where its notes say; None where they do not say.

    The notes may be relative to the student's folder or, of older students, to the working directory of their training.
    """
    noted = read_student(folder)["notes"].get("teacher")
    places = [Path(folder) / TEACHER, *([] if noted is None else [Path(folder) / noted, Path(noted)])]
    return next((str(place) for place in places if place.is_dir()), noted)


def load_whole_student(folder: str | Path) -> Student:
    """A student with the base of its folder, or else the one that its notes name. Errors: UsageError as in `load_student`."""
    base = teacher_folder(folder)
    if base is None:
        raise UsageError(f"{folder} does not name its teacher's folder; read both with load_student(folder, teacher)")
    return load_student(folder, load_masked(base))


def load_student(folder: str | Path, base: LladaModel, option: str = "teacher.path") -> Student:
    """Put a saved trained part on the base it was trained on. Raises UsageError, naming the option, for another base."""
    description = read_student(folder)
    if description["base"] != base_fingerprint(base):
        raise UsageError(
            f"the student in {folder} was trained on another base model than the one given; "
            f"type {option}=<the folder of its teacher>; its notes name {description['notes'].get('teacher')}"
        )
    student = KINDS[description["kind"]](base, **description["options"])
    weights = Path(folder) / "student.safetensors"
    try:
        held = load_file(weights)
        if held.keys() != trainable_weights(student).keys():
            raise RuntimeError(f"its tensors are not those of a {description['kind']} student")
        student.load_state_dict(held, strict=False)
    except (SafetensorError, FileNotFoundError, RuntimeError) as error:
        raise UsageError(f"{weights} cannot be read ({str(error).splitlines()[0]}); train the student again") from error
    return student.to(torch.device(base.device)).eval()
