"""Two ranks that are asked to end save together, and the run that goes on ends as an uninterrupted one does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
STEPS = 240
RUN = [
    "experiment=objectives", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", f"trainer.max_steps={STEPS}",
    "trainer.limit_val_batches=0", "logger=none", "data.size=tiny", "data.train_rows=64", "data.val_rows=16",
    "data.test_rows=16", "data.batch_size=8", "data.eval_batch_size=8", "module.forwards=[1]", "model.hidden_size=16",
    "model.num_hidden_layers=1", "model.intermediate_size=16", "callbacks.probe=null",
    "callbacks.checkpoint.every_n_train_steps=20", "paths.output_dir=out", "paths.cache_dir=cache",
]  # fmt: skip


def start(folder: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run.py"), *RUN, f"hydra.run.dir={folder}", *options]
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    # a process group of its own, as a shell gives every command
    return subprocess.Popen(
        command, cwd=folder.parent, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def ended(run: subprocess.Popen) -> tuple[int, str]:
    """Exit status and output of a run of which no rank is left: each holds the output open until it ends."""
    try:
        printed, _ = run.communicate(timeout=200)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    return run.returncode, printed


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    return checkpoint["state_dict"]


@pytest.mark.slow
def test_a_signal_to_all_ranks_or_to_the_first_alone_is_a_checkpoint_of_all(tmp_path):
    whole = tmp_path / "whole"
    status, printed = ended(start(whole))
    assert status == 0, printed
    for who in ("group", "parent"):
        folder = tmp_path / who
        run, last = start(folder), folder / "checkpoints" / "last.ckpt"
        while not last.is_file() and run.poll() is None:
            time.sleep(0.02)
        assert run.poll() is None, run.communicate()[0]
        (os.killpg if who == "group" else os.kill)(run.pid, signal.SIGTERM)
        status, printed = ended(run)
        assert status == 128 + signal.SIGTERM, (who, printed)
        step = torch.load(last, weights_only=True)["global_step"]
        assert step < STEPS
        assert printed.count(f"interrupted; step {step} is saved in {last}") == 1, (who, printed)
        assert printed.count("SIGTERM: saving after this step") == 1, (who, printed)
        status, printed = ended(start(folder, f"ckpt_path={last}"))
        assert status == 0, (who, printed)
        found = weights(folder)
        for name, weight in weights(whole).items():
            assert torch.equal(found[name], weight), (who, name)
