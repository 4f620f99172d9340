"""Finds checkpoints and students of earlier runs, and what those runs were made with.

A run keeps the state of its corpus in `data/` and the models that it stands on in `made_with.json`. One whose folder lies
elsewhere (hydra.run.dir) is listed in `runs.txt` of its experiment's folder.
"""

import json
import os
from pathlib import Path

import torch

from app.model_cache import require_readable
from callbacks.resumed_options import OPTIONS
from datamodules.corpus import CorpusDataModule
from datamodules.state import TOKENIZER, CorpusState, is_state
from datamodules.tokenizer import TRAINED
from models.flow.student_files import TEACHER
from models.functional.errors import UsageError
from models.plans.files import BACKBONE
from reporting.command import option
from reporting.record import write_whole

DATA = "data"  # folder of a run: state of its corpus
MADE_WITH = "made_with.json"
RUNS = "runs.txt"  # folders of an experiment's runs that lie elsewhere, one a line


# -- finding ---------------------------------------------------------------------------------------------------------


def found(runs: Path, pattern: str) -> list[Path]:
    """The files of the pattern in all runs of an experiment, oldest first."""
    files = {path.resolve(): path for path in runs.glob(f"**/{pattern}")}
    for folder in _elsewhere(runs):
        files |= {path.resolve(): path for path in folder.glob(pattern)}
    return sorted(files.values(), key=lambda path: path.stat().st_mtime)


def newest(runs: Path, pattern: str, advice: str) -> Path:
    """The newest file of the pattern in any of an experiment's runs. Raises UsageError, with the advice, if there is none."""
    files = found(runs, pattern)
    if not files:
        raise UsageError(f"experiment {runs.name} below {runs.parent}: {advice}")
    return files[-1]


def find_checkpoint(runs: Path, ckpt_path: str) -> Path:
    """`ckpt_path` as a readable file; `last` is the experiment's newest."""
    if ckpt_path == "last":
        advice = "no run of it left a checkpoint; leave ckpt_path out to start one"
        return require_readable(newest(runs, "checkpoints/last.ckpt", advice))
    path = Path(ckpt_path)
    if os.path.isdir(path):
        inside = (path / "last.ckpt", path / "checkpoints" / "last.ckpt")
        found_there = next((file for file in inside if file.is_file()), path / "<a file>.ckpt")
        raise UsageError(f"ckpt_path={path} is a folder; type {option('ckpt_path', str(found_there))}")
    if not os.path.isfile(path):
        raise UsageError(
            f"ckpt_path={path} does not exist; type ckpt_path=last for the newest of experiment={runs.name}"
        )
    return require_readable(path)


def require_same_module(checkpoint: Path, target: str) -> None:
    """Raise UsageError for a checkpoint of another module than the class `target` names; older ones name none."""
    noted = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get(OPTIONS, {})
    before = str(noted.get("module._target_", target)).rpartition(".")[2]
    now = target.rpartition(".")[2]
    if before != now:
        raise UsageError(
            f"ckpt_path={checkpoint} was trained by {before}, and these options make a {now}; type the experiment= and module= "
            "of its run"
        )


def runs_elsewhere(outputs: Path) -> list[Path]:
    """The folders of all experiments' runs that lie outside the outputs folder."""
    return [folder for listed in sorted(outputs.glob(f"**/{RUNS}")) for folder in _elsewhere(listed.parent)]


def newest_student(runs: Path) -> Path:
    """The folder of the experiment's newest student."""
    advice = f"no student has been trained; type python run.py experiment={runs.name} first, or student_path=<folder>"
    return newest(runs, "student/student.json", advice).parent


def _elsewhere(runs: Path) -> list[Path]:
    """The folders of an experiment's runs that lie elsewhere and are still its own."""
    listed = runs / RUNS
    folders = [Path(line) for line in listed.read_text(encoding="utf-8").splitlines()] if listed.is_file() else []
    return [folder for folder in dict.fromkeys(folders) if _made_with(folder).get("experiment") == runs.name]


# -- what a run was made with ----------------------------------------------------------------------------------------


def keep_made_with(folder: Path, runs: Path, state: CorpusState, models: dict[str, str | None]) -> None:
    """Write into the folder of a run what it is made with.

    runs: folder of the runs of its experiment. models: {"teacher": folder or hub name}, and the like.
    """
    state.save(folder / DATA)
    here = {name: str(Path(path).absolute()) for name, path in models.items() if path and Path(path).is_dir()}
    noted = {"experiment": runs.name, "models": models | here}
    write_whole(folder / MADE_WITH, json.dumps(noted, indent=1) + "\n")
    if not folder.resolve().is_relative_to(runs.resolve()) and folder.absolute() not in _elsewhere(runs):
        runs.mkdir(parents=True, exist_ok=True)
        with open(runs / RUNS, "a", encoding="utf-8") as listed:
            listed.write(f"{folder.absolute()}\n")


def run_of(weights: Path) -> Path | None:
    """The folder of the run that a checkpoint, a student's or a model's folder belongs to; None where it kept nothing."""
    folders = [weights, *weights.absolute().parents[:3]]
    return next((folder for folder in folders if is_state(folder / DATA)), None)


def corpus_state(weights: Path | None, datamodule: CorpusDataModule) -> CorpusState | None:
    """The state of the corpus that weights were trained on: of their run, else the tokenizer that lies with them.

    None where nothing is known of it, and where the tokenizer is not made from the rows.
    """
    run = None if weights is None else run_of(weights)
    if run is not None:
        return CorpusState.read(run / DATA)
    if weights is None or getattr(datamodule, "tokenizer_kind", None) not in TRAINED:
        return None
    folders = (weights, weights / TEACHER, weights / BACKBONE, weights.parent.parent / "model")
    folder = next((one for one in folders if (one / TOKENIZER).is_file()), None)
    return None if folder is None else CorpusState.of_model(folder, datamodule.packed)


def models_of(weights: Path) -> dict[str, str]:
    """{name: folder or hub name} of the models that the run of these weights stands on, such as its teacher."""
    run = run_of(weights)
    return {} if run is None else {name: path for name, path in _made_with(run).get("models", {}).items() if path}


def _made_with(run: Path) -> dict:
    path = run / MADE_WITH
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
