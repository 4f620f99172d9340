"""record.json: what a run measured, in one schema for every method.

{"format", "experiment", "commit", "seed", "device", "versions": {}, "config": {}, "data": {...}, "rows": [{"method",
"decoder", "nfe", "quality": {}, "entropy", "distinct", "cost": {"tokens_per_forward", "tokens_per_s", "flops_per_token",
"peak_memory_bytes", "batch", "seconds_per_batch", "nfe_per_batch", "seconds_alone", "first_token_seconds"}, "n_samples",
"ci95": {}}]}. A value that was not measured is null. nfe: number of function evaluations, the forward passes for one text.
The cost of a student also has "trained_weights", "base_weights" and "trained_share". The row of a model itself also has
"curve": {name: []}. A run of q* has "alpha_curve": {name: [] or figure}, see `AlphaCurve`. A
run that compares several decoders of one method has "aup": {"quality", "y_max", "methods": {method: AUP}}, see `tpf_figure`.
"texts" are the first ones of each decoder: [{"decoder", "prompt", "response", "fault"}], by prompt in the order of test rows.
Records of earlier formats are read, too.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from models.functional.errors import UsageError
from reporting.keys import FORMAT, upgrade_record

KEYS = ("experiment", "commit", "seed", "device", "versions", "config", "data", "rows")
PACKAGES = ("torch", "lightning", "transformers", "peft", "hydra-core", "omegaconf", "torchmetrics")


def build_record(
    experiment: str,
    seed: int,
    device: torch.device,
    config: dict,
    data: dict,
    rows: list[dict],
    commit: str | None = None,
) -> dict:
    """A record without files. commit: the checkout's where the run began, see `current_commit`."""
    return {
        "format": FORMAT,
        "experiment": experiment,
        "commit": commit,
        "seed": seed,
        "device": device_name(device),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "config": config,
        "data": data,
        "rows": rows,
    }


def write_record(record: dict[str, Any], path: str | Path) -> Path:
    return write_whole(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def write_whole(path: str | Path, text: str) -> Path:
    """Write a file in one step: a reader sees the old one or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.partial")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    return path


def read_record(path: str | Path) -> dict[str, Any]:
    """A record from disk, in the format of today. Raises UsageError, naming the file, where it is none or is of a newer one."""
    try:
        record = json.loads(Path(path).read_text(), parse_constant=lambda _: None)  # NaN and infinity: not measured
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable record ({error}); remove it or run the experiment again") from error
    missing = [key for key in KEYS if not isinstance(record, dict) or key not in record]
    if missing:
        raise UsageError(f"{path} lacks {', '.join(missing)}; remove it or run the experiment again")
    if record.get("format", 1) > FORMAT:
        raise UsageError(
            f"{path} has format {record['format']}, and this version of Leap reads formats up to {FORMAT}; "
            "update Leap, or move the file away"
        )
    return upgrade_record(record)


def files_below(folders: Iterable[str | Path], name: str) -> list[Path]:
    """The files of this name in the folders and below them, each once, oldest first."""
    files = {path.resolve(): path for folder in folders for path in Path(folder).rglob(name)}
    return sorted(files.values(), key=lambda path: path.stat().st_mtime)


def find_records(folder: str | Path, elsewhere: Iterable[Path] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Every record.json below a folder, and those of runs elsewhere, oldest first. Raises UsageError when there is none."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise UsageError(f"the folder {folder} does not exist; type report_dir=<folder with runs> or run an experiment")
    found = files_below([folder, *elsewhere], "record.json")
    if not found:
        raise UsageError(
            f"no record.json below {folder}; run an experiment first: python run.py experiment=meanflow_llada"
        )
    return [(path, read_record(path)) for path in found]


def newest_rows(records: Iterable[dict[str, Any]]) -> dict[tuple, dict[str, Any]]:
    """{(corpus, experiment, method, decoder, NFE, seed): row} of records, oldest first.

    A run repeated with the same seed replaces the earlier one. NFE is 0 where it was measured: it differs from seed to seed.
    """
    newest: dict[tuple, dict[str, Any]] = {}
    for record in records:
        for row in record["rows"]:
            # drafts are accepted or not, and rules follow the confidence
            measured = "speedup_vs_naive" in row["cost"] or isinstance(row["nfe"], float)
            nfe = 0 if measured else row["nfe"]
            labels = (record["data"]["name"], record["experiment"], row["method"], row["decoder"], nfe)
            newest[*labels, record["seed"]] = row
    return newest


def current_commit() -> str | None:
    """The checkout's commit, with "+changes" where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
