"""Runs of a sweep: the options that differ and the results, best run first, as a table and a figure.

Every run of a sweep leaves job.json: {"sweep", "number", "overrides": [], "metric": {"name", "value"}, "seconds", "failed"};
the table adds figures of its record.json. A run that failed has a line that says so.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from reporting.hparams import headline
from reporting.keys import current_name
from reporting.record import files_below, read_record, write_whole
from reporting.sweep_figure import sweep_figure

JOB = "job.json"
# shown beside the metric, the first few that some run knows
QUALITIES = (
    "validity", "validity_none", "exact_match", "slot_accuracy", "bleu", "judge_perplexity", "bits_per_byte", "nll",
    "nll_bound", "efficiency", "tv",
)  # fmt: skip
MOST_QUALITIES = 3
LOW = {
    "loss",
    "nll",
    "perplexity",
    "byte",
    "tv",
    "error",
    "seconds",
}  # words of figures that are better when they are lower


@dataclass
class SweepRun:
    """One run. options: as typed; value: of the optimised metric; quality: figures of its record's main row."""

    folder: Path
    sweep: str
    number: int
    options: dict[str, str]
    metric: str
    value: float | None
    seconds: float
    failed: str | None
    quality: dict[str, float]


def write_job(folder: str | Path, **notes: Any) -> None:
    """Put job.json into a run's folder, in one step."""
    write_whole(Path(folder) / JOB, json.dumps(notes, indent=2) + "\n")


def read_sweeps(*folders: str | Path, only: str | None = None) -> dict[str, list[SweepRun]]:
    """The runs of every sweep below the folders, or of one, oldest sweep first, runs by number."""
    sweeps: dict[str, list[SweepRun]] = defaultdict(list)
    for path in files_below(folders, JOB):
        try:
            notes = json.loads(path.read_text())
            if only not in (None, notes["sweep"]):
                continue
            run = _read_run(path.parent, notes)
        except (OSError, ValueError, KeyError, TypeError):  # not one of ours
            continue
        sweeps[run.sweep].append(run)
    return {name: sorted(sweeps[name], key=lambda run: (run.number, str(run.folder))) for name in sorted(sweeps)}


def _read_run(folder: Path, notes: dict[str, Any]) -> SweepRun:
    record = folder / "record.json"
    quality = headline(read_record(record)) if record.is_file() and not notes["failed"] else {}
    return SweepRun(
        folder=folder,
        sweep=notes["sweep"],
        number=notes["number"],
        options=dict(_option(override) for override in notes["overrides"]),
        metric=current_name(notes["metric"]["name"]),
        value=notes["metric"]["value"],
        seconds=notes["seconds"],
        failed=notes["failed"],
        quality={name.removeprefix("result/"): value for name, value in quality.items()},
    )


def _option(override: str) -> tuple[str, str]:
    name, _, value = override.partition("=")
    return name.lstrip("+"), value


# -- what differs, and what is best -----------------------------------------------------------------------------------


def differing(runs: list[SweepRun]) -> list[str]:
    """Options that are not the same in all runs, in the order in which they were typed."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    return [name for name in names if len({run.options.get(name) for run in runs}) > 1]


def lower_is_better(figure: str) -> bool:
    """Of losses, likelihoods, perplexities, bits per byte, distances and times; of every other figure more is better."""
    return bool(LOW & set(figure.split("/")[-1].split("_")))


def best_first(runs: list[SweepRun]) -> list[SweepRun]:
    """By the optimised metric, then runs without one, then those that failed."""

    def order(run: SweepRun) -> tuple[bool, bool, float]:
        value = 0.0 if run.value is None else run.value if lower_is_better(run.metric) else -run.value
        return run.failed is not None, run.value is None, value

    return sorted(runs, key=order)


def shown_qualities(runs: list[SweepRun]) -> list[str]:
    """A few figures of the records, none that is the optimised metric itself."""
    own = {run.metric.removeprefix("result/") for run in runs}
    return [name for name in QUALITIES if name not in own and any(name in run.quality for run in runs)][:MOST_QUALITIES]


# -- showing ----------------------------------------------------------------------------------------------------------


def report_sweep(runs: list[SweepRun], folder: str | Path, name: str, console: Console) -> None:
    """Print the table; write <name>.md, <name>.png and a TensorBoard page to the folder. runs: all of one sweep."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs, options, qualities = best_first(runs), differing(runs), shown_qualities(runs)
    heads = ["run", *options, runs[0].metric, *qualities, "seconds"]
    lines = [_cells(run, options, qualities) for run in runs]
    failed = [(run.number, run.failed) for run in runs if run.failed is not None]
    console.print()
    console.print(_table(f"sweep {runs[0].sweep}: {len(runs)} runs, best first", heads, lines))
    for number, reason in failed:
        console.print(f"[red]run {number} failed:[/] {escape(reason)}", highlight=False, soft_wrap=True)
    text = "\n".join(["| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines]])
    text += "".join(f"\n\nrun {number} failed: {reason}" for number, reason in failed)
    (folder / f"{name}.md").write_text(text + "\n")
    drawn = sweep_figure([run for run in runs if run.failed is None], options, qualities)
    with SummaryWriter(str(folder)) as writer:
        writer.add_text(name, text)
        if drawn is not None:
            drawn.savefig(folder / f"{name}.png", dpi=130)
            writer.add_figure(name, drawn)
    figure = "" if drawn is None else f"   figure: {folder}/{name}.png"
    best = "" if runs[0].failed is not None else f"best run: {runs[0].folder}   "
    console.print(f"{best}table: {folder}/{name}.md{figure}", highlight=False, soft_wrap=True)


def _cells(run: SweepRun, options: list[str], qualities: list[str]) -> list[str]:
    figures = [run.value, *(run.quality.get(name) for name in qualities)]
    cells = ["failed" if run.failed is not None and k == 0 else _written(value) for k, value in enumerate(figures)]
    return [str(run.number), *(run.options.get(name, "") for name in options), *cells, f"{run.seconds:.1f}"]


def _written(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(title: str, heads: list[str], lines: list[list[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(escape(head), justify="right", overflow="fold")
    for line in lines:
        table.add_row(*map(escape, line))
    return table
