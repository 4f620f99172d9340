"""Finds checkpoints and students of earlier runs."""

from pathlib import Path

from app.model_cache import require_readable
from models.functional.errors import UsageError


def newest(runs: Path, pattern: str, advice: str) -> Path:
    """The newest file of the pattern in any of an experiment's runs. Raises UsageError, with the advice, if there is none."""
    found = sorted(runs.glob(f"**/{pattern}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"experiment {runs.name} below {runs.parent}: {advice}")
    return found[-1]


def find_checkpoint(runs: Path, ckpt_path: str) -> Path:
    """`ckpt_path` as a readable file; `last` is the experiment's newest."""
    if ckpt_path == "last":
        advice = "no run of it left a checkpoint; leave ckpt_path out to start one"
        return require_readable(newest(runs, "checkpoints/last.ckpt", advice))
    path = Path(ckpt_path)
    if not path.is_file():
        raise UsageError(
            f"ckpt_path={path} does not exist; type ckpt_path=last for the newest of experiment={runs.name}"
        )
    return require_readable(path)


def newest_student(runs: Path) -> Path:
    """The folder of the experiment's newest student."""
    advice = f"no student has been trained; type python run.py experiment={runs.name} first, or student_path=<folder>"
    return newest(runs, "student/student.json", advice).parent
