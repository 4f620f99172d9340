"""Leap's entry (run.py --help). What it does stands in `app`, imported when there is work to do: help needs no networks."""

import os
import sys

import hydra
from omegaconf import DictConfig

from app.command_line import mistake_in, quoted
from app.experiments import experiment_list
from app.welcome import WELCOME


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    if "torch" not in sys.modules and os.environ.get("LOCAL_RANK", "0") == "0":
        print("loading libraries", file=sys.stderr, flush=True)  # seconds of silence otherwise
    from app.modes import run_mode
    from app.sweep import in_sweep, run_of_sweep
    from reporting.console import print_error, quiet_libraries, sentence_for

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


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(WELCOME)
        sys.exit(0)
    if "--list" in sys.argv[1:]:
        print(experiment_list())
        sys.exit(0)
    sys.argv[1:] = quoted(sys.argv[1:])
    mistake = mistake_in(sys.argv[1:])
    if mistake is not None:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    try:
        main()
    except KeyboardInterrupt:  # outside training, which saves first
        print("interrupted", file=sys.stderr)
        sys.exit(130)
