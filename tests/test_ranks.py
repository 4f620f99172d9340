"""Two processes on one CPU: the whole job runs, every test row is answered once, one student is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SHORT = [
    "experiment=meanflow_llada", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=6",
    "trainer.val_check_interval=3", "teacher.max_steps=3", "data.size=tiny", "data.train_rows=64", "data.test_rows=33",
    "data.batch_size=8", "data.eval_batch_size=8", "module.forwards=[1,2]", "module.student_forwards=[1,2]",
    "module.ode_forwards=[2]", "module.ode_steps=2", "model.hidden_size=16", "model.num_hidden_layers=1",
    "model.intermediate_size=16", "logger=none",
]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_train_compare_and_save(tmp_path):
    places = [f"paths.output_dir={tmp_path}/out", f"paths.cache_dir={tmp_path}/cache"]
    done = subprocess.run(
        [sys.executable, "run.py", *SHORT, *places],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("record.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["n_samples"] for row in rows} == {33}
    assert [row["decoder"] for row in rows if row["method"] == "student"] == ["student", "student", "denoiser's flow"]
    weights = load_file(path.parent / "student" / "student.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


@pytest.mark.slow
def test_two_ranks_that_share_the_weights_leave_what_one_rank_reads(tmp_path):
    places = [f"paths.output_dir={tmp_path}/out", f"paths.cache_dir={tmp_path}/cache", "trainer=fsdp"]
    own = {"OMP_NUM_THREADS": "1"}

    def run(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "run.py", *SHORT, *places, *options],
            cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | own,
        )  # fmt: skip

    done = run()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("record.json")
    record = json.loads(path.read_text())
    assert {row["n_samples"] for row in record["rows"]} == {33}
    again = run("trainer=cpu", "mode=test", "ckpt_path=last")  # teacher, checkpoint: all of it fits one rank
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    refused = run("trainer.devices=1")
    assert refused.returncode == 2
    assert "there is one only; type trainer.devices=2" in refused.stderr


# experiments that draw nothing at random and lose a mean over texts: halves of a batch on two ranks are the batch
ALIKE = {
    "objectives": (
        ["module.forwards=[1]"], ("nll", "perplexity", "nll_truth", "flops_per_step", "train_flops", "train_tokens")
    ),
    "concept_oracle": (
        [
            "module.corruption=[0,0]", "module.weights.usage=0", "module.weights.commitment=0",
            "module.search={begin: 0.5, explore: 0.0}",
        ],
        ("nll_given_plan", "nll_bound", "nll_truth", "rate_bits", "efficiency", "joint_information", "nmi"),
    ),
    "concept_online_oracle": (
        ["module.noise=[0,0]", "module.weights.ratio=0", "module.weights.code=0", "module.weights.usage=0", "module.codes=8",
         "model.num_hidden_layers=3", "module.anneal_share=0"],
        ("nll", "nll_truth", "compression"),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ALIKE)
def test_two_ranks_train_and_measure_what_one_does(tmp_path, experiment):
    options, names = ALIKE[experiment]
    short = [
        f"experiment={experiment}", "trainer.accelerator=cpu", "trainer.max_steps=4", "trainer.val_check_interval=2",
        "data.size=tiny", "data.train_rows=64", "data.test_rows=33", "data.val_rows=17", "data.eval_batch_size=8",
        "model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16", *options,
        "logger=none", f"paths.cache_dir={tmp_path}/cache",
    ]  # fmt: skip
    ranks = {1: ["data.batch_size=16"], 2: ["data.batch_size=8", "trainer=ddp", "trainer.devices=2"]}
    runs = {
        n: subprocess.Popen(
            [sys.executable, "run.py", *short, *own, f"paths.output_dir={tmp_path}/{n}"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for n, own in ranks.items()
    }  # fmt: skip
    found = {}
    for n, running in runs.items():
        printed, _ = running.communicate(timeout=300)
        assert running.returncode == 0, printed[-3000:]
        (path,) = (tmp_path / str(n)).rglob("record.json")
        (found[n],) = (row["quality"] for row in json.loads(path.read_text())["rows"] if row["method"] == "model")
    for name in names:
        assert found[1][name] == pytest.approx(found[2][name], rel=1e-5), name
