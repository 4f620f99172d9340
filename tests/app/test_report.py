"""mode=report: which runs it reads, by what folder is named."""

import json
from pathlib import Path

import pytest
import torch
from helpers.record import make_record, quality, row

from app import modes
from app.command_line import mistake_in
from app.run_files import RUNS
from models.functional.errors import UsageError


def leave_run(folder: Path, experiment: str, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    record = make_record([row("student", "student", 1, quality(validity=0.5))]) | {"experiment": experiment}
    (folder / "record.json").write_text(json.dumps(record | {"seed": seed}))
    (folder / "made_with.json").write_text(json.dumps({"experiment": experiment, "models": {}}))


def reported(folder: Path) -> str:
    return (folder / "report" / "frontier.md").read_text()


def test_a_report_has_all_runs_of_the_outputs_folder_and_those_sent_elsewhere(configure, tmp_path):
    leave_run(tmp_path / "out" / "first" / "run", "first")
    away = tmp_path / "it's away [1]" / "my run"
    leave_run(away, "second")
    (tmp_path / "out" / "second").mkdir()
    (tmp_path / "out" / "second" / RUNS).write_text(f"{away}\n{tmp_path}/gone\n")
    modes.run_mode(configure("mode=report"))
    text = reported(tmp_path / "out")
    assert "| first |" in text
    assert "| second |" in text


@pytest.mark.parametrize("typed", ["away/my run", "away", "away/", "link"])
def test_a_report_of_any_folder_of_a_run_or_of_many(configure, tmp_path, typed):
    leave_run(tmp_path / "out" / "first" / "run", "first")
    leave_run(tmp_path / "away" / "my run", "second")
    (tmp_path / "link").symlink_to(tmp_path / "away")
    assert mistake_in(["mode=report", f"report_dir='{typed}'"]) is None
    modes.run_mode(configure("mode=report", f"report_dir='{typed}'"))
    text = reported(tmp_path / typed)
    assert "| second |" in text
    assert "| first |" not in text


def test_folders_without_runs_are_named(configure, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"nowhere does not exist; type report_dir="):
        modes.run_mode(configure("mode=report", "report_dir=nowhere"))
    with pytest.raises(UsageError, match=r"no record\.json below empty"):
        modes.run_mode(configure("mode=report", "report_dir=empty"))
    leave_run(tmp_path / "run", "first")
    (tmp_path / "run" / "report").write_text("a file")
    with pytest.raises(UsageError, match="the report cannot be written to run/report"):
        modes.run_mode(configure("mode=report", "report_dir=run"))


def test_a_sweep_may_name_its_metric_as_older_versions_did():
    logged = {"monitor/nll_own_condition": torch.tensor(0.5)}
    trainer = type("NoCallbacks", (), {"callbacks": []})()
    assert modes._optimised("monitor/nll_given_own", logged, trainer) == 0.5
    assert modes._optimised("monitor/nll_own_condition", logged, trainer) == 0.5
    assert modes._optimised("monitor/nll_given", logged, trainer) is None
