"""Sweeps (`run.py -m`): each run prints its options, a run that fails does not end the others, a summary at the end.

Imported by Hydra at every start, so everything heavy is imported where there is work.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

# beginnings of options that do not decide which model is trained
OF_ONE_RUN = (
    "mode=",
    "ckpt_path=",
    "student_path=",
    "trainer",
    "callbacks",
    "logger",
    "paths.run_dir",
    "optimized_metric",
)


def in_sweep() -> bool:
    """Whether this run is one of several that one command started."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def typed_again() -> list[str]:
    """The options of this run's command that name its model: those of its training and of one run alone are left out."""
    typed = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return [option for option in typed if not option.lstrip("+").startswith(OF_ONE_RUN)]


def run_of_sweep(cfg: DictConfig, run: Callable[[DictConfig], float | None]) -> float | None:
    """Do one run of a sweep and write job.json. Returns the metric, or None where the run failed: its error is printed and
    noted in job.json, and raised only with HYDRA_FULL_ERROR=1."""
    import traceback

    from reporting.console import print_error, report_console, sentence_for
    from reporting.sweep import write_job

    job = HydraConfig.get()
    number, overrides = int(job.job.num), list(job.overrides.task)
    report_console().print(f"\n[bold]run {number}[/]: {' '.join(overrides)}", highlight=False, soft_wrap=True)
    value = failed = None
    begun = time.monotonic()
    try:
        value = run(cfg)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        failed = sentence_for(error)
        if failed is None:  # a defect of ours: show its traceback
            traceback.print_exc()
            failed = f"{type(error).__name__}: {error}"
        print_error(f"run {number} failed: {failed}; the others go on")
    write_job(
        cfg.paths.run_dir,
        sweep=cfg.started,
        number=number,
        overrides=overrides,
        metric={"name": cfg.optimized_metric, "value": value if value is not None and math.isfinite(value) else None},
        seconds=time.monotonic() - begun,
        failed=failed,
    )
    return value


class SweepSummary(Callback):
    """Hydra's callback: when all runs are done, their table and figure; status 2 where some have failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        str(config.started)  # read once, so that all runs of the sweep have the same

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from reporting.console import report_console
        from reporting.sweep import read_sweeps, report_sweep

        folder = Path(OmegaConf.select(config, "hydra.sweep.dir"))
        outputs = Path(config.paths.output_dir)
        places = [outputs] if folder.is_relative_to(outputs) else [outputs, folder]
        runs = [run for place in places for run in read_sweeps(place, config.started).get(config.started, [])]
        if not runs:
            return
        report_sweep(runs, folder, f"sweep_{config.started}", report_console())
        if any(run.failed is not None for run in runs):
            sys.exit(2)
