"""The README's main job at full length. Minutes: run with `pytest -m slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_main_job_reaches_what_the_readme_says(tmp_path):
    """One forward that is coherent and diverse where every factorised generator is neither."""
    places = [f"paths.output_dir={tmp_path}/outputs", f"paths.cache_dir={tmp_path}/cache"]
    subprocess.run(
        [sys.executable, "run.py", "experiment=meanflow_llada", *places], cwd=ROOT, check=True, capture_output=True
    )
    (path,) = (tmp_path / "outputs").rglob("record.json")
    rows = {(row["decoder"], row["nfe"]): row for row in json.loads(path.read_text())["rows"]}
    quality = {key: row["quality"] for key, row in rows.items()}

    teacher = quality["teacher, sampled", 16]
    assert teacher["validity"] >= 0.95
    assert abs(teacher["exact_nll"] - teacher["exact_nll_truth"]) < 0.2
    product, floor = quality["product of marginals", 0], quality["resampling floor", 0]
    assert floor["validity"] == 1.0
    assert product["validity_none"] < 0.05  # what one forward from a fixed all-mask response is bound by
    one, four = quality["student", 1], quality["student", 4]
    assert one["validity_all"] >= 0.97
    assert one["validity_part"] >= 0.93
    assert one["validity_none"] >= 0.9
    assert four["validity"] >= 0.97
    truth = rows["resampling floor", 0]["entropy"]  # the same estimator on as many texts
    assert abs(rows["student", 1]["entropy"] - truth) < 0.08 * truth
    assert one["tv"] < floor["tv"] + 0.15
    assert one["coverage"] > 0.97
