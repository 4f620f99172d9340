"""A run that is killed anywhere, and taken up again, ends where an uninterrupted one does.

A life is a process that runs `run.py` and may be killed, with SIGKILL, before any of its optimiser steps or any of its writes:
a file opened for writing, renamed or removed. Or its weights are poisoned there, its data worker killed, its disk full, or it
is asked to end, with SIGTERM, in an optimiser step.
"""

import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SMALL = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16", "trainer.accelerator=cpu"]
ROWS = ["data.size=tiny", "data.train_rows=64", "data.val_rows=16", "data.test_rows=16", "data.batch_size=16"]
SHORT = [
    *SMALL, *ROWS, "data.eval_batch_size=16", "trainer.max_steps=8", "trainer.val_check_interval=3", "logger=none",
    "callbacks.checkpoint.every_n_train_steps=1", "paths.output_dir=out", "paths.cache_dir=cache", "hydra.run.dir=out/run",
]  # fmt: skip
TAUGHT = ["teacher.max_steps=5", "teacher.callbacks.checkpoint.every_n_train_steps=1", "module.forwards=[1,2]"]
TIMED = ("seconds", "share")  # figures of a clock
MOST_BYTES = 20_000  # of a file on a full disk: less than a checkpoint, more than what is printed
METHODS = {
    "objectives": ["module.forwards=[1]"],
    "meanflow_llada": [*TAUGHT, "module.student_forwards=[1]", "module.ode_forwards=[2]", "module.ode_steps=2"],
    "baseline_logit_flow": TAUGHT,
    "baseline_step_halving": [*TAUGHT, "module.student_forwards=[1]", "module.start_forwards=4"],
    "concept_oracle": [],
    "concept_online_oracle": ["model.num_hidden_layers=3", "module.codes=8"],
    "qstar_oracle": [
        *(f"pair.{name}.{option}" for name in ("theta", "target") for option in ("max_steps=4", TAUGHT[1].split(".", 1)[1])),
        "module.exactness_samples=0",
    ],
}  # fmt: skip


def live(folder: str, arguments: list[str], at: int, fault: str, events) -> None:
    """The child: `run.py` with these arguments; counts its events and lets the fault happen before number `at`."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    os.chdir(folder)
    done: list[int] = []
    sys.stdout = sys.stderr = open("output.txt", "a")  # noqa: SIM115

    def happens(optimizer=None) -> None:
        if fault == "terminated":  # counts steps alone
            events.value += optimizer is not None
            if optimizer is not None and events.value == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return
        events.value += 1
        if events.value < at or (events.value > at and fault not in ("poisoned", "worker")) or at in done:
            return
        if fault == "poisoned":
            if optimizer is not None:  # the next step of it
                done.append(at)
                for group in optimizer.param_groups:
                    for weight in group["params"]:
                        weight.data.fill_(torch.nan)
        elif fault == "worker":
            for child in multiprocessing.active_children():
                done.append(at)
                os.kill(child.pid, signal.SIGKILL)
        elif fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        else:  # from here on no file can hold a checkpoint
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, MOST_BYTES))

    def watch(event: str, about: tuple) -> None:
        writes = event == "open" and isinstance(about[1], str) and set(about[1]) & set("wax+")
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            happens()

    hook = register_optimizer_step_post_hook if fault == "poisoned" else register_optimizer_step_pre_hook
    hook(lambda optimizer, *_: happens(optimizer))
    sys.addaudithook(watch)
    sys.argv = ["run.py", *arguments]
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")


class Lives:
    """Runs of one method in a folder, each a process of its own."""

    def __init__(self, folder: Path, method: str, *options: str) -> None:
        self.folder, self.arguments = folder, [f"experiment={method}", *SHORT, *METHODS[method], *options]
        folder.mkdir()
        self.run = folder / "out" / "run"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["app.modes", "datamodules.oracle"])

    @property
    def last(self) -> Path:
        return self.run / "checkpoints" / "last.ckpt"

    def live(self, at: int = 0, fault: str = "killed") -> tuple[int, int]:
        """Start, or go on where the last life ended. Returns the exit status, negative for a signal, and the events."""
        going_on = [f"ckpt_path={self.last}"] if self.last.is_file() else []
        events = self.context.Value("i", 0, lock=False)
        child = self.context.Process(target=live, args=(str(self.folder), self.arguments + going_on, at, fault, events))
        child.start()
        child.join()
        return child.exitcode, events.value

    def left(self) -> dict:
        """All weights that the run left, and what it measured."""
        weights = {
            f"{path.relative_to(self.folder)}:{name}": tensor.tolist()
            for path in sorted(self.folder.glob("**/*.safetensors"))
            for name, tensor in load_file(path).items()
        }
        last = torch.load(self.last, weights_only=True)
        weights |= {name: tensor.tolist() for name, tensor in last["state_dict"].items()}
        rows = json.loads((self.run / "record.json").read_text())["rows"]
        quality = [
            {name: row["quality"][name] for name in row["quality"] if not set(TIMED) & set(name.split("_"))}
            for row in rows
        ]
        return {"weights": weights, "quality": quality}

    def said(self) -> str:
        return (self.folder / "output.txt").read_text()[-3000:]


@pytest.mark.parametrize(
    ("method", "kills"), [("objectives", 2), *(pytest.param(name, 20, marks=pytest.mark.slow) for name in METHODS)]
)
def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch, method, kills):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT))
    whole = Lives(tmp_path / "whole", method)
    status, events = whole.live()
    assert status == 0, whole.said()
    expected = whole.left()
    draw, survived, lives = random.Random(0), 0, None
    while survived < kills or lives is not None:
        if lives is None:
            lives = Lives(tmp_path / f"after{survived}", method)
        at = draw.randint(1, events) if survived < kills else 0
        status, _ = lives.live(at)
        if status == -signal.SIGKILL:
            survived += 1
            continue
        assert status == 0, lives.said()
        assert lives.left() == expected
        lives = None


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("objectives", 8),
        *(pytest.param(name, 13, marks=pytest.mark.slow) for name in ("meanflow_llada", "qstar_oracle")),
    ],
)
def test_a_run_that_is_asked_to_end_saves_its_step_first(tmp_path, monkeypatch, method, steps):
    """Checkpoints are far apart, so that the one of the signal is the only one; of a teacher's training as well."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    far = [
        option.replace("train_steps=1", "train_steps=1000")
        for option in SHORT + METHODS[method]
        if "train_steps" in option
    ]
    whole = Lives(tmp_path / "whole", method, *far)
    assert whole.live()[0] == 0, whole.said()
    lives = Lives(tmp_path / "ended", method, *far)
    status, ended = lives.live(random.Random(method).randint(1, steps - 1), "terminated")
    assert status == 128 + signal.SIGTERM, lives.said()
    assert "is saved in" in lives.said()
    assert "Traceback" not in lives.said()
    (saved,) = lives.folder.rglob("last.ckpt")
    assert 0 < torch.load(saved, weights_only=True)["global_step"] <= ended
    assert lives.live()[0] == 0, lives.said()
    assert lives.left() == whole.left()


@pytest.mark.parametrize(
    "share", [0.3, pytest.param(0.5, marks=pytest.mark.slow), pytest.param(0.7, marks=pytest.mark.slow)]
)
def test_a_full_disk_is_said_and_costs_nothing_that_was_good(tmp_path, monkeypatch, share):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    whole = Lives(tmp_path / "whole", "objectives")
    _, events = whole.live()
    lives = Lives(tmp_path / "full", "objectives")
    status, _ = lives.live(int(share * events), "full")
    assert status == 2, lives.said()
    assert "no space is left to write" in lives.said()
    assert "Traceback" not in lives.said()
    status, _ = lives.live()  # room again
    assert status == 0, lives.said()
    assert lives.left() == whole.left()


@pytest.mark.parametrize(
    ("fault", "sentence", "options"),
    [
        ("poisoned", "training diverged, and the checkpoint before it is kept", []),
        pytest.param("worker", "a process that loads data has died", ["data.num_workers=1"], marks=pytest.mark.slow),
    ],
)
def test_a_fault_in_training_is_said_and_the_last_good_state_is_kept(tmp_path, monkeypatch, fault, sentence, options):
    """Weights that are not finite; a data worker that is killed. What goes on from the last checkpoint ends as if nothing
    had happened."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    whole = Lives(tmp_path / "whole", "objectives")
    _, events = whole.live()
    lives = Lives(tmp_path / "hurt", "objectives", *options)
    status, _ = lives.live(events // 2, fault)
    assert status == 2, lives.said()
    assert sentence in lives.said()
    assert "Traceback" not in lives.said()
    kept = torch.load(lives.last, weights_only=True)
    assert 0 < kept["global_step"] < 8
    assert all(torch.isfinite(tensor).all() for tensor in kept["state_dict"].values())
    lives.arguments = whole.arguments  # without workers, as the sentence advises
    status, _ = lives.live()
    assert status == 0, lives.said()
    assert lives.left() == whole.left()


def test_a_checkpoint_cut_short_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    lives = Lives(tmp_path / "run", "objectives")
    status, _ = lives.live()
    record = (lives.run / "record.json").read_text()
    whole = lives.last.read_bytes()
    lives.last.write_bytes(whole[: len(whole) // 2])
    (lives.folder / "output.txt").write_text("")
    status, _ = lives.live()
    assert status == 2, lives.said()
    assert "last.ckpt is damaged or no checkpoint of plain tensors; give another one" in lives.said()
    assert "Traceback" not in lives.said()
    assert (lives.run / "record.json").read_text() == record
    assert lives.last.read_bytes() == whole[: len(whole) // 2]  # for whoever wants to look
