"""Every monitor says the same on one process and on two, and in a window that one began and the other ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def job(ranks: int, out: Path, *resume: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "tests/helpers/monitor_ranks_job.py", str(ranks), str(out), *resume],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip


def finished(running: subprocess.Popen, out: Path) -> dict[str, float]:
    printed, _ = running.communicate(timeout=300)
    assert running.returncode == 0, printed[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path):
    files = {ranks: tmp_path / f"{ranks}.json" for ranks in (1, 2)}
    running = {ranks: job(ranks, out) for ranks, out in files.items()}
    one, two = (finished(running[ranks], files[ranks]) for ranks in (1, 2))
    wanted = {
        "dnll_shuffle",
        "dnll_blank",
        "dnll_random",
        "dnll_nearest",
        "dnll_shuffle_at_3_low",
        "nll_at_0",
        "margin",
    }
    wanted |= {"plan_flips", "staleness", "posterior_entropy", "relaxation_cosine", "relaxation_distance"}
    wanted |= {"planner_gradient", "planner_gradient_max"}
    watched = {name for name in one if name.removeprefix("monitor/") in wanted}
    assert len(watched) == len(wanted)
    for name in watched:
        assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_two_ranks_go_on_with_the_window_that_they_had_begun(tmp_path):
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    expected = finished(job(2, whole), whole)
    found = finished(job(2, resumed, str(tmp_path / "2" / "step=2.ckpt")), resumed)
    for name in ("margin", "plan_flips", "staleness", "relaxation_cosine", "planner_gradient", "planner_gradient_max"):
        assert found[f"monitor/{name}"] == pytest.approx(expected[f"monitor/{name}"], rel=1e-6), name
