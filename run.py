"""Leap's entry (run.py --help). What it does stands in `app`, imported when there is work to do: help needs no networks."""

import io
import os
import signal
import sys
from typing import TYPE_CHECKING

from app.ranks import leads
from app.signals import end_at_once_on_signals, raise_on_signals

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(cfg: "DictConfig") -> float | None:
    say_loading()
    from app.modes import run_mode
    from app.sweep import in_sweep, run_of_sweep
    from reporting.console import print_error, quiet_libraries, sentence_for

    raise_on_signals()
    with quiet_libraries():
        if in_sweep():
            return run_of_sweep(cfg, run_mode)
        try:
            return run_mode(cfg)
        except Exception as error:
            sentence = sentence_for(error)
            if sentence is None or os.environ.get("HYDRA_FULL_ERROR"):
                raise
            print_error(sentence)
            sys.exit(2)


def say_loading() -> None:
    """One rank says what takes the first seconds, which would be silent otherwise."""
    if "torch" not in sys.modules and leads():
        print("loading libraries", file=sys.stderr, flush=True)


def print_anything() -> None:
    """Characters that the terminal or file cannot hold, such as an arrow in Latin-1, are printed as \\u2192."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def start() -> None:
    """What was typed: help, the list of experiments, a mistake, or a run."""
    if len(sys.argv) == 1:
        from app.welcome import WELCOME

        print(WELCOME)
        return
    if "--list" in sys.argv[1:]:
        from app.experiments import experiment_list

        print(experiment_list())
        return
    import hydra

    from app.command_line import mistake_in, quoted

    sys.argv[1:] = quoted(sys.argv[1:])
    mistake = mistake_in(sys.argv[1:])
    if mistake is not None:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    hydra.main(version_base="1.3", config_path="conf", config_name="config")(main)()


if __name__ == "__main__":
    end_at_once_on_signals()
    print_anything()
    if len(sys.argv) == 1 or {"--list", "--help", "-h", "--cfg", "-c"} & set(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # such as `run.py --list | head`; training has sockets of its own
    start()
