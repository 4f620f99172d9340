"""What the benchmarks share: options, interleaved timing, peak memory, one table and one JSON layout.

Times are seconds. Nothing here judges a speed: a benchmark measures, its reader decides.
"""

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.profiler import ProfilerActivity, profile

from reporting.record import current_commit, device_name

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Times = dict[str, list[float]]
Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


class Parser(argparse.ArgumentParser):
    """Notes what was typed, as `typed` of the parsed options: a record names its command."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        typed = sys.argv[1:] if args is None else list(args)
        found, rest = super().parse_known_args(typed, namespace)
        found.typed = typed
        return found, rest


def new_parser(description: str, *, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; its own are added to it."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds that count; a round runs everything once")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that do not count")
    parser.add_argument("--seed", type=int, default=0, help="of weights, texts and draws")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; 1 where other work runs beside it")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall",
        help="cpu: processor time of this process, steadier on a busy machine; only with --threads 1 on a CPU",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers and the table to this file")
    return parser


def prepare(args: argparse.Namespace) -> torch.device:
    """Seed and thread count set; the device to work on."""
    if args.repeats < 1 or args.warmup < 0:
        raise SystemExit("--repeats has to be at least 1 and --warmup at least 0")
    if args.clock == "cpu" and (args.device != "cpu" or args.threads != 1):
        raise SystemExit("--clock cpu counts every thread's waiting too; type --clock cpu --threads 1 --device cpu")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return torch.device(args.device)


# -- measuring -------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds since it was started, with the device's queued work finished first.

    clock: `wall`, or `cpu` for the processor time of this process.
    """

    def __init__(self, device: torch.device, clock: str) -> None:
        self.device, self._now = device, CLOCKS[clock]
        self.start()

    def start(self) -> None:
        self._start = self._finished()

    def seconds(self) -> float:
        return self._finished() - self._start

    def _finished(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._now()


def timed(run: Callable[[], Any], device: torch.device, clock: str) -> Callable[[], float]:
    """A function that calls `run` and returns how many seconds it took."""

    def measure() -> float:
        watch = Stopwatch(device, clock)
        run()
        return watch.seconds()

    return measure


def interleave(measures: dict[str, Callable[[], float]], *, repeats: int, warmup: int) -> Times:
    """Seconds of every measure, `repeats` each, taken in the order A B C A B C ... after `warmup` uncounted rounds.

    A busy spell of the machine then falls on neighbours alike, and the ratio within one round stays fair.
    """
    times: Times = {name: [] for name in measures}
    gc.freeze()  # what lives already need not be looked through at every collection
    for turn in range(warmup + repeats):
        for name, measure in measures.items():
            gc.collect()  # otherwise one measure's garbage is collected on the next one's time
            seconds = measure()
            if turn >= warmup:
                times[name].append(seconds)
    gc.unfreeze()
    return times


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of one value, that value."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes of tensors alive at once during `run`, beyond those alive before it.

    CUDA: max_memory_allocated. CPU: the running sum of the allocations and releases that torch.profiler records, which
    sees every tensor, those saved for backward included, but no scratch memory that a kernel's library keeps to itself.
    None where nothing was recorded.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        recorded.export_chrome_trace(path)
        events = json.loads(Path(path).read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak or None


# -- showing ---------------------------------------------------------------------------------------------------------


def build_row(name: str, times: Times, baseline: str, **more: Any) -> Row:
    """One line of the result: quartiles of the seconds and of the ratio to the baseline taken round by round."""
    ratios = [ours / theirs for ours, theirs in zip(times[name], times[baseline], strict=True)]
    return {"name": name, "seconds": quartiles(times[name]), "ratio": quartiles(ratios), **more}


def build_result(
    benchmark: str, args: argparse.Namespace, device: torch.device, rows: list[Row], reading: str, **more: Any
) -> dict[str, Any]:
    """Everything that is printed and written, in the layout that all benchmarks share."""
    threads = torch.get_num_threads()
    return {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "command": command_of(benchmark, args.typed),
        "options": {key: value for key, value in vars(args).items() if key not in ("json", "typed")},
        "device": device_name(device) + (f", {threads} CPU threads" if device.type == "cuda" else ""),
        "threads": threads,
        "torch": torch.__version__,
        "commit": current_commit(),
        "rows": rows,
        "reading": " ".join(reading.split()),
        **more,
    }


def command_of(benchmark: str, typed: Sequence[str]) -> str:
    """What is typed to measure again, without the file that it was written to."""
    words, left = [], iter(typed)
    for word in left:
        if word == "--json":
            next(left, None)
        elif not word.startswith("--json="):
            words.append(word)
    return shlex.join(["python", f"benchmarks/{benchmark}.py", *words])


def show(result: dict[str, Any], columns: Columns, console: Console) -> None:
    """Print where it was measured, a table whose columns are read off each row, and how to read it."""
    clock, commit = result["options"]["clock"], result["commit"] or "unknown"
    console.print(
        f"{result['benchmark']}: {result['device']}; {clock} clock; torch {result['torch']}; commit {commit}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(build_table(result["rows"], columns))
    console.print(f"\nHow to read it: {result['reading']}\n", highlight=False, markup=False)


def build_table(rows: list[Row], columns: Columns) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0))
    for index, title in enumerate(columns):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        table.add_row(*(Text(write(row)) for write in columns.values()))
    return table


def write_json(result: dict[str, Any], path: Path | None, columns: Columns) -> None:
    """A record of what was printed; "table": its cells, from which `reporting.publish` makes tables of the documentation."""
    if path is not None:
        rows = [[write(row) for write in columns.values()] for row in result["rows"]]
        result = {**result, "table": {"columns": list(columns), "rows": rows}}
        path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def in_milliseconds(row: Row) -> str:
    return f"{1e3 * row['seconds']['median']:.2f}"


def with_spread(found: dict[str, float]) -> str:
    """The median with the interquartile range behind it."""
    return f"{found['median']:.3f} [{found['q1']:.3f}, {found['q3']:.3f}]"


def as_ratio(row: Row) -> str:
    return with_spread(row["ratio"])


def in_mebibytes(row: Row) -> str:
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
