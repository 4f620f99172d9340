"""Leap's entry (run.py --help). What it does stands in `wiring`, imported when there is work to do: help needs no networks."""

import os
import sys

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    from rich.console import Console
    from rich.markup import escape

    from callbacks.console import quiet_libraries, sentence_for
    from wiring.modes import run_mode

    try:
        with quiet_libraries():
            return run_mode(cfg)
    except Exception as error:
        sentence = sentence_for(error)
        if sentence is None or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
