"""The README's main job at full length. Minutes: run with `pytest -m slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_main_job_reaches_what_the_readme_says(tmp_path):
    """A teacher that is right at many forwards, a student that is right where one forward can be, and the bound elsewhere."""
    places = [f"paths.output_dir={tmp_path}/outputs", f"paths.cache_dir={tmp_path}/cache"]
    subprocess.run(
        [sys.executable, "run.py", "experiment=meanflow_llada", *places], cwd=ROOT, check=True, capture_output=True
    )
    (path,) = (tmp_path / "outputs").rglob("record.json")
    rows = json.loads(path.read_text())["rows"]
    quality = {(row["decoder"], row["forwards"]): row["quality"] for row in rows}

    teacher = quality["teacher, sampled", 16]
    assert teacher["validity"] >= 0.95
    assert abs(teacher["exact_nll"] - teacher["exact_nll_truth"]) < 0.2
    product, floor = quality["product of marginals", 0], quality["resampling floor", 0]
    student = quality["student, sampled", 1]
    assert student["validity_all"] >= 0.95  # the plan decides the text: one forward is enough
    assert student["validity_part"] <= product["validity_part"] + 0.1  # otherwise it factorises
    assert floor["validity"] == 1.0
    assert floor["tv"] < teacher["tv"] + 0.05
