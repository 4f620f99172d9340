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

from app.ranks import leads
from app.start import claim_start

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
    if not leads():  # the first rank's folders hold the results
        return value
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


class RunsAndSweeps(Callback):
    """Hydra's callback: a folder of its own for each start; when all runs of a sweep are done, their table and figure.

    A sweep of which some run has failed, or left no result, ends with status 2.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        claim_start(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        claim_start(config, "hydra.sweep.dir")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from reporting.console import print_error, report_console
        from reporting.sweep import read_sweeps, report_sweep

        if not leads():
            return
        folder = Path(OmegaConf.select(config, "hydra.sweep.dir"))
        outputs = Path(config.paths.output_dir)
        folders = [outputs] if folder.is_relative_to(outputs) else [outputs, folder]
        runs = read_sweeps(*folders, only=config.started).get(config.started, [])
        if runs:
            report_sweep(runs, folder, f"sweep_{config.started}", report_console())
        missing = missing_runs([run.number for run in runs], _expected(config))
        if missing:
            print_error(f"no result of run {', '.join(map(str, missing))} of the sweep {config.started}; see {folder}")
        if missing or any(run.failed is not None for run in runs):
            sys.exit(2)


def missing_runs(numbers: list[int], expected: int | None) -> list[int]:
    """Numbers of runs that left no result. expected: how many there should be; None where only the sweeper knows."""
    wanted = max(numbers, default=0) + 1 if expected is None else expected
    return sorted(set(range(wanted)) - set(numbers))


def _expected(config: DictConfig) -> int | None:
    """How many runs Hydra's own sweeper makes of the options; None of another sweeper, whose runs follow from results."""
    sweeper = OmegaConf.select(config, "hydra.sweeper")
    if not sweeper["_target_"].endswith("BasicSweeper"):
        return None
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed = list(config.hydra.overrides.task)
    typed += [f"{name}={value}" for name, value in (sweeper.get("params") or {}).items()]
    values = (o for o in OverridesParser.create().parse_overrides(typed) if o.is_sweep_override())
    return math.prod(len(list(override.sweep_string_iterator())) for override in values)
