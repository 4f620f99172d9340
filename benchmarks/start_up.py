"""What one waits for before anything happens: `run.py --help`, and the first optimiser step of a run.

python benchmarks/start_up.py --repeats 5
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import Row, build_result, build_row, interleave, new_parser, prepare, show, write_json

from reporting.console import report_console

ROOT = Path(__file__).parent.parent
IMPORTS = "import torch, lightning, transformers"
EXPERIMENTS = ("objectives", "concept_oracle", "concept_online_oracle", "qstar_oracle", "meanflow_llada")
# a run that ends, with its files unwritten, at the end of its first optimiser step; a teacher's counts where one is trained
UNTIL_FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
sys.argv = ["run.py", *sys.argv[1:]]
runpy.run_path(os.path.abspath("run.py"), run_name="__main__")
raise SystemExit("no step was taken")
"""

READING = """
a process of its own each time, from its start until help is printed or the first optimiser step is done (of the teacher or
the pair, where those are trained first; caches empty). The libraries alone are what no run can go below. A ratio is the
time over that of the libraries in the same round, median [first, third quartile].
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """What is started, by name; runs write to the folder."""
    places = [f"paths.output_dir={folder}/outputs", f"paths.cache_dir={folder}/cache", "trainer.accelerator=cpu"]
    found = {"the libraries alone": ["-c", IMPORTS], "run.py --help": ["run.py", "--help"]}
    for name in EXPERIMENTS:
        found[f"first step, {name}"] = ["-c", UNTIL_FIRST_STEP, f"experiment={name}", *places]
    return found


def seconds_of(command: list[str], clock: str, threads: int | None) -> float:
    """Of a process that has to end well; clock=cpu: its processor time."""
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    before, begun = _processor_seconds(), time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[-2:])} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return _processor_seconds() - before if clock == "cpu" else time.perf_counter() - begun


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_all(args: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        chosen = {name: c for name, c in commands(Path(folder)).items() if not args.only or args.only in name}
        baseline = next(iter(chosen))
        measures: dict[str, Callable[[], float]] = {
            name: lambda command=command: seconds_of(command, args.clock, args.threads)
            for name, command in chosen.items()
        }
        times = interleave(measures, repeats=args.repeats, warmup=args.warmup)
        return [build_row(name, times, baseline) for name in measures]


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=5)
    parser.set_defaults(warmup=1)
    parser.add_argument("--only", default="", help="what has this in its name, such as help")
    args = parser.parse_args(argv)
    prepare(args)
    result = build_result("start_up", args, torch.device("cpu"), measure_all(args), READING)
    columns = {
        "from start to": lambda row: row["name"],
        "seconds": lambda row: (
            f"{row['seconds']['median']:.2f} [{row['seconds']['q1']:.2f}, {row['seconds']['q3']:.2f}]"
        ),
        "ratio": lambda row: f"{row['ratio']['median']:.2f}",
    }
    show(result, columns, report_console())
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
