"""Shows that a change leaves every result as it was: losses of the first steps and first texts of every experiment.

    python benchmarks/same_results.py write before.json          # on the commit before the change
    python benchmarks/same_results.py write after.json           # on the commit after it, on the same machine
    python benchmarks/same_results.py compare before.json after.json

Floats are written as float.hex, so equal means equal to the last bit. One thread a run; seeds are the experiments' own.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MEASURED = ("seconds", "per_s", "search_share", "speedup")  # parts of names of figures that a clock gives
STEPS, ROWS = 20, 8  # of training; texts of each decoder
SHORT = [
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=10",
    "trainer.log_every_n_steps=5",
    "trainer.accelerator=cpu",
    "logger=none",
]
ORACLE = ["data.train_rows=2000", "data.val_rows=64", "data.test_rows=64"]


def overrides(cfg: Any, folder: Path) -> list[str]:
    """What makes the experiment short, and reads files that are written to `folder`."""
    from helpers.experiment import model_overrides, pairs_overrides

    if cfg.study is not None:
        return []
    found = [*SHORT, *model_overrides(cfg, folder), *pairs_overrides(cfg, folder)]
    if "Oracle" in cfg.data._target_:
        found += ORACLE
    if cfg.teacher is not None:
        found += [f"teacher.max_steps={STEPS}"]
    if "budget" in cfg.callbacks:
        found += ["callbacks.budget.flops=null"]  # it would set the number of steps
    if cfg.pair is not None:
        found += [f"pair.{name}.max_steps={STEPS}" for name in cfg.pair if cfg.pair[name].path is None]
        found += ["trainer.max_steps=4", "module.lora_rank=2", "module.exactness_samples=64"]
    return found


def trace(found: dict[str, list]) -> type:
    """A callback's class: it adds each step's loss and each decoder's first texts to `found`."""
    import torch
    from lightning import Callback

    class Trace(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            name = f"{type(pl_module).__name__} loss"
            found.setdefault(name, []).append(float(torch.as_tensor(outputs["loss"])).hex())

        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
            if batch_idx:
                return
            for result in outputs["results"]:
                decoder = result.decoder
                name = f"{decoder.method} {decoder.name} {decoder.forwards}"
                found[name] = result.responses[:ROWS].tolist()

    return Trace


def run(name: str) -> dict[str, list]:
    """Train, compare and ask one experiment in this process."""
    import lightning
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    from app import modes

    torch.set_num_threads(1)
    torch.manual_seed(0)  # of models that are made to be read
    found: dict[str, list] = {}
    watch, begin = trace(found), lightning.Trainer.__init__

    def watched(self, *args, callbacks=None, **options) -> None:
        begin(self, *args, callbacks=[*(callbacks or []), watch()], **options)

    lightning.Trainer.__init__ = watched
    with (
        tempfile.TemporaryDirectory() as work,
        contextlib.chdir(work),
        initialize_config_dir(str(ROOT / "conf"), version_base="1.3"),
    ):
        places = ["paths.output_dir=out", "paths.cache_dir=cache"]

        def configure(*more: str):
            cfg = compose("config", [f"experiment={name}", *places, *more], return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            return cfg

        places += [f"paths.run_dir={work}/out/{configure('paths.run_dir=x').name}/run"]
        more = overrides(configure(), Path(work))
        modes.fit(configure(*more))
        record = next(Path(work).rglob("record.json"), None)
        if record is not None:
            rows = json.loads(record.read_text())["rows"]
            found["quality"] = [[r["decoder"], r["nfe"], exact(r["quality"])] for r in rows]
        asked = configure(*more, "mode=generate", "prompt='who=anna'", "temperature=0")
        if asked.study is None:
            found["answer"] = [printed(modes.generate, asked)]
    return found


def printed(call: Any, cfg: Any) -> str:
    """What mode=generate prints, or why it answers nothing."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            call(cfg)
        except Exception as error:  # an experiment that exports no model says so
            return type(error).__name__
    return out.getvalue()


def exact(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures without those of a clock, floats in hexadecimal."""
    kept = {name: value for name, value in figures.items() if not any(part in name for part in MEASURED)}
    return {name: value.hex() if isinstance(value, float) else value for name, value in kept.items()}


def write(path: str, names: list[str], jobs: int) -> None:
    names = names or sorted(found.stem for found in (ROOT / "conf" / "experiment").glob("*.yaml"))
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(jobs, **fresh) as pool:
        found = dict(zip(names, pool.map(run, names), strict=True))
    Path(path).write_text(json.dumps(found, indent=1, sort_keys=True))
    print(f"{len(found)} experiments in {path}")


def named_as_today(found: dict[str, Any]) -> dict[str, Any]:
    """The same results with figures of records under their names of today."""
    from reporting.keys import current_names

    for series in found.values():
        if "quality" in series:
            series["quality"] = [[name, nfe, current_names(figures)] for name, nfe, figures in series["quality"]]
    return found


def compare(before: str, after: str, names: list[str]) -> int:
    """The number of experiments that differ, one line each; of all experiments where no names are given."""
    old, new = (named_as_today(json.loads(Path(path).read_text())) for path in (before, after))
    differ = 0
    for name in names or sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            differ += 1
            print(f"{name}: only in {before if name in old else after}")
            continue
        unlike = sorted(k for k in old[name].keys() | new[name].keys() if old[name].get(k) != new[name].get(k))
        differ += bool(unlike)
        print(f"{name}: {'differs in ' + ', '.join(unlike) if unlike else 'equal'} ({len(new[name])} series)")
    return differ


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="run every experiment and write what it gave")
    writing.add_argument("path")
    writing.add_argument("names", nargs="*", help="experiments; all of conf/experiment if none is given")
    writing.add_argument("--jobs", type=int, default=2, help="experiments at a time")
    comparing = commands.add_parser("compare", help="name what differs between two files; status 1 if anything does")
    comparing.add_argument("before")
    comparing.add_argument("after")
    comparing.add_argument("names", nargs="*", help="experiments; all if none is given")
    args = parser.parse_args()
    if args.command == "compare":
        sys.exit(1 if compare(args.before, args.after, args.names) else 0)
    write(args.path, args.names, args.jobs)
