"""A sweep's summary: what differs, what is best, where a run stands on each axis; and the command line itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from reporting.sweep import best_first, differing, lower_is_better, read_sweeps, report_sweep, write_job
from reporting.sweep_figure import Scale, sweep_figure

ROOT = Path(__file__).parent.parent.parent
TINY = [
    "experiment=objectives", "data.size=tiny", "data.train_rows=32", "data.val_rows=16", "data.test_rows=16",
    "data.batch_size=16", "module.forwards=[1]", "trainer.max_steps=2", "trainer.val_check_interval=1",
    "trainer.accelerator=cpu", "model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16",
    "paths.output_dir=out", "paths.cache_dir=cache", "callbacks.probe=null",
]  # fmt: skip


def note(
    folder: Path, number: int, overrides: list[str], value: float | None, failed=None, metric="val/loss", sweep="s"
):
    metric = {"name": metric, "value": value}
    write_job(folder, sweep=sweep, number=number, overrides=overrides, metric=metric, seconds=1.0, failed=failed)


@pytest.fixture
def sweep(tmp_path):
    """Four runs: the second is best by its loss, the third failed, the last has no value. Strangers' job.json beside them."""
    base = ["experiment=objectives", "trainer.limit_val_batches=1"]
    for number, (lr, value, failed) in enumerate(
        [(0.1, 0.5, None), (0.01, 0.25, None), (9, None, "lr"), (1, None, None)]
    ):
        note(tmp_path / f"s/{number}", number, [*base, f"module.lr={lr}", "seed=0"], value, failed)
    for place, content in (("other", '{"job": 1}'), ("half", '{"sweep": "half"}')):
        (tmp_path / place).mkdir()
        (tmp_path / place / "job.json").write_text(content)
    return read_sweeps(tmp_path)


def test_runs_are_found_and_only_options_that_differ_are_columns(sweep):
    assert list(sweep) == ["s"]
    assert [run.number for run in sweep["s"]] == [0, 1, 2, 3]
    assert differing(sweep["s"]) == ["module.lr"]
    assert sweep["s"][0].options["trainer.limit_val_batches"] == "1"


def test_best_first_then_runs_without_a_value_then_failures(sweep, tmp_path):
    assert [run.number for run in best_first(sweep["s"])] == [1, 0, 3, 2]
    for number, value in enumerate((0.2, 0.9)):
        note(tmp_path / f"t/{number}", number, [f"seed={number}"], value, metric="result/validity", sweep="t")
    assert [run.number for run in best_first(read_sweeps(tmp_path)["t"])] == [1, 0]


@pytest.mark.parametrize(
    "figure", ["val/loss", "val/nll_bound", "result/perplexity", "result/bits_per_byte", "result/tv"]
)
def test_what_is_better_when_it_is_lower(figure):
    assert lower_is_better(figure)


@pytest.mark.parametrize(
    "figure", ["result/validity", "result/exact_match", "result/bleu", "val/accuracy", "result/gain_bits"]
)
def test_what_is_better_when_it_is_higher(figure):
    assert not lower_is_better(figure)


def test_axes_of_numbers_powers_and_words():
    plain = Scale(["2", "4", "3"])
    assert [plain(value) for value in ("2", "3", "4")] == [0.0, 0.5, 1.0]
    wide = Scale(["1e-4", "1e-2", "1e-3"])
    assert wide("1e-3") == pytest.approx(0.5)
    words = Scale(["relu", "gelu", ""])
    assert [words(word) for word in ("", "gelu", "relu")] == [0.0, 0.5, 1.0]
    assert words.ticks() == [(0.0, "-"), (0.5, "gelu"), (1.0, "relu")]
    assert Scale(["3", "3"])("3") == 0.5
    assert [label for _, label in Scale([str(k) for k in range(20)]).ticks()] == ["0", "19"]
    assert [label for _, label in Scale(["0", "1", "50", "100"]).ticks()] == [
        "0",
        "50",
        "100",
    ]  # labels do not cover each other


def test_the_figure_has_a_line_a_run_and_an_axis_a_column(sweep):
    figure = sweep_figure([run for run in sweep["s"] if run.failed is None], ["module.lr"], [])
    axis = figure.axes[0]
    lines = [line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 1.0], [0.0, 0.0]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["module.lr", "val/\nloss"]
    assert sweep_figure(sweep["s"][:1], ["module.lr"], []) is None


def test_the_report_names_the_run_that_failed_and_leaves_its_files(sweep, tmp_path):
    console = Console(width=120, record=True)
    report_sweep(sweep["s"], tmp_path / "report", "sweep_s", console)
    said = console.export_text()
    assert "4 runs, best first" in said
    assert "run 2 failed: lr" in said
    assert f"best run: {tmp_path}/s/1" in said.replace("\n", "")
    table = [line for line in (tmp_path / "report" / "sweep_s.md").read_text().splitlines() if line.startswith("| ")]
    assert table[0] == "| run | module.lr | val/loss | seconds |"
    assert table[2] == "| 1 | 0.01 | 0.25 | 1.0 |"
    assert table[-1] == "| 2 | 9 | failed | 1.0 |"
    assert (tmp_path / "report" / "sweep_s.png").stat().st_size > 1000
    assert list((tmp_path / "report").glob("events*"))


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "run.py"), "-m", *TINY, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_run_that_fails_names_itself_and_the_others_are_kept(tmp_path):
    """Two groups and an option swept; a learning rate that is refused ends one run, and the command with status 2."""
    done = run(tmp_path, "module/objective=next_token,masked_diffusion", "module.lr=1e-3,-1")
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "Traceback" not in output
    assert done.stderr.count("loading libraries") == 1
    assert "run 1 failed: module.lr=-1 must be at least 0; the others go on" in output
    runs = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("job.json"))]
    assert {note["number"]: note["failed"] is None for note in runs} == {0: True, 1: False, 2: True, 3: False}
    for note in runs:
        assert (note["metric"]["value"] is not None) == (note["failed"] is None)
    assert {path.parent.name for path in tmp_path.rglob("record.json")} == {
        path.parent.name for path in tmp_path.rglob("job.json") if json.loads(path.read_text())["failed"] is None
    }
    (table,) = tmp_path.rglob("sweep_*.md")
    assert table.read_text().startswith("| run | module/objective | module.lr | val/loss |")
    assert table.with_suffix(".png").is_file()


@pytest.mark.slow
def test_optuna_and_joblib_take_the_metric(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    choice = ["hydra/sweeper=optuna", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_trials=4"]
    options = ["hydra.sweeper.n_jobs=2", "hydra.sweeper.direction=minimize", "hydra.sweeper.sampler.seed=0"]
    done = run(tmp_path, *choice, *options, "module.lr=tag(log,interval(1e-4,1e-1))", "optimized_metric=val/nll")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("job.json"))]
    values = [note["metric"]["value"] for note in runs]
    assert len(values) == 4
    assert len({note["sweep"] for note in runs}) == 1
    (found,) = tmp_path.rglob("optimization_results.yaml")
    assert f"best_value: {min(values)}" in found.read_text()
