"""A signal outside of training: one line, the exit status of shells, and nothing left behind."""

import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from helpers.experiment import ROOT, SMALL

from app import build, command_line, modes, signals
from datamodules import token_cache

LINE = "interrupted by {}; nothing was being trained, so no step is lost"
RUN = ["experiment=tutorial_text", "data.train=text.txt", "data.cut=blank_line", "trainer.max_steps=1", "logger=none"]


def in_a_child(act, output: Path) -> int:
    """The exit status of a copy of this process that does `act` and prints to a file; negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 0
        try:
            written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(written, descriptor)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            act()
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    ("phase", "signum"),
    [("tokenizer", signal.SIGTERM), ("tokens", signal.SIGINT), ("tokens", signal.SIGXCPU), ("model", signal.SIGTERM)],
)
def test_a_signal_before_training_ends_with_a_line_and_leaves_nothing(configure, tmp_path, monkeypatch, phase, signum):
    """While a tokenizer is saved, tokens are written, or a model is made."""
    (tmp_path / "text.txt").write_text("".join(f"A paragraph about {k}.\n\n" for k in range(60)))
    write = token_cache._write
    if phase == "tokenizer":
        monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", lambda *_: kill(signum))
    elif phase == "tokens":
        monkeypatch.setattr(token_cache, "_write", lambda *given: (write(*given), kill(signum)))
    else:
        monkeypatch.setattr(build, "new_model", lambda *_: kill(signum))
    cfg = configure(*RUN, *SMALL)

    def run() -> None:
        signals.raise_on_signals()
        modes.run_mode(cfg)

    assert in_a_child(run, tmp_path / "printed") == 128 + signum
    printed = (tmp_path / "printed").read_text()
    assert printed.splitlines()[-1] == LINE.format(signal.Signals(signum).name)
    assert "Traceback" not in printed
    made = {
        "tokenizer": ["tokenizers"],
        "tokens": ["tokenizers/*/tokenizer.json", "tokens"],
        "model": ["tokens/*/*.json"],
    }
    assert all(list(tmp_path.glob(f"cache/{path}")) for path in made[phase])  # it had come that far
    assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name or "partial" in path.name]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_command_answers_signals_from_its_first_lines_on(tmp_path, monkeypatch, signum):
    """At once at first; in the work itself what has been begun is undone."""
    script = str(ROOT / "run.py")

    def read() -> None:
        command_line.quoted = lambda arguments: kill(signum)
        sys.argv = ["run.py", *RUN]
        runpy.run_path(script, run_name="__main__")

    def work(cfg) -> None:
        with open(tmp_path / "temporary", "w") as file:
            try:
                kill(signum)
            finally:
                os.remove(file.name)

    assert in_a_child(read, tmp_path / "printed") == 128 + signum
    assert (tmp_path / "printed").read_text() == LINE.format(signum.name) + "\n"
    monkeypatch.setattr(modes, "run_mode", work)
    main = runpy.run_path(script)["main"]
    assert in_a_child(lambda: main(None), tmp_path / "printed") == 128 + signum
    assert (tmp_path / "printed").read_text() == LINE.format(signum.name) + "\n"
    assert not (tmp_path / "temporary").exists()


@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_what_kept_the_first_to_itself(tmp_path, again):
    def stubborn() -> None:
        signals.raise_on_signals()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            os.kill(os.getpid(), again)
        os._exit(0)

    assert in_a_child(stubborn, tmp_path / "printed") == 128 + again


def test_one_rank_speaks(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")

    def run() -> None:
        signals.end_at_once_on_signals()
        os.kill(os.getpid(), signal.SIGTERM)

    assert in_a_child(run, tmp_path / "printed") == 143
    assert (tmp_path / "printed").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_libraries_are_imported(tmp_path, signum):
    command = [sys.executable, str(ROOT / "run.py"), "experiment=objectives", "paths.output_dir=out"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout.readline() == "loading libraries\n"
    run.send_signal(signum)
    assert run.communicate(timeout=100)[0] == LINE.format(signum.name) + "\n"
    assert run.returncode == 128 + signum
