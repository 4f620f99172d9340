"""Rows, tables and the figure of all records together, quality against cost.

Runs of the same experiment with different seeds become one row: mean and 95 % interval (Student's t) over the seeds. A run
repeated with the same seed replaces the earlier one; give a variant its own name=... to keep it apart.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich import box
from rich.table import Table

from reporting.figure import PREFERRED, STYLE, scale_quality
from reporting.intervals import half_width
from reporting.record import newest_rows
from reporting.table import COLUMNS, NFE, as_markdown, nfe_cell, value_at, written

COLUMN = {column.name: column for column in COLUMNS}
# of these the worst seed is shown, for their mean has no meaning
WORST = {"g_test_p": min, "max_enumeration_error": max}
STUDENT_COLOURS = ("#c8553d", "#8e5ea2", "#4a8f5a", "#d39b2a", "#1f9aa5", "#7a5230", "#e377a2", "#222222")


@dataclass
class FrontierRow:
    """One decoder of one experiment on one corpus; `values` holds each figure's values, one for each seed.

    nfe: a mean with a fraction where it was measured. ci95: {figure: (low, high)} over the texts of the last run.
    """

    corpus: str
    experiment: str
    method: str
    decoder: str
    nfe: float
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def seeds(self) -> int:
        return max((len(values) for values in self.values.values()), default=0)

    def mean(self, name: str) -> float | None:
        return fmean(self.values[name]) if self.values.get(name) else None

    def half_width(self, name: str) -> float | None:
        """Half of the 95 % interval of the mean over seeds; None for fewer than two."""
        return half_width(self.values.get(name, []))


def frontier_rows(records: list[dict[str, Any]]) -> list[FrontierRow]:
    """The records' rows, oldest record first, by corpus, experiment and decoder."""
    rows: dict[tuple, FrontierRow] = {}
    counted: dict[tuple, list[float]] = defaultdict(list)
    for (*labels, _), row in newest_rows(records).items():
        key = tuple(labels)
        own = rows.setdefault(key, FrontierRow(*key))
        known = row | {"derived": _derived(row["quality"])}
        for column in COLUMNS:
            if (value := value_at(known, column.path)) is not None:
                own.values[column.name].append(value)
        counted[key].append(row["nfe"])
        own.ci95 = {name: tuple(interval) for name, interval in row.get("ci95", {}).items()}
    for key, own in rows.items():
        own.nfe = fmean(counted[key]) if len(set(counted[key])) > 1 else counted[key][0]
    return sorted(rows.values(), key=lambda r: (r.corpus, r.method == "control", r.experiment))


def _derived(quality: dict[str, float | None]) -> dict[str, float]:
    """Figures that follow from others of the same run, taken seed by seed, so that they have an interval.

    above_truth: nats a token, or their bound, minus the texts' own. goal_flops: what was spent until the goal.
    """
    known = {name: value for name, value in quality.items() if value is not None}
    found = {}
    likelihood = known.get("nll", known.get("nll_bound"))
    if likelihood is not None and "nll_truth" in known:
        found["above_truth"] = likelihood - known["nll_truth"]
    if {"goal_tokens", "train_tokens", "train_flops"} <= known.keys():
        found["goal_flops"] = known["goal_tokens"] / known["train_tokens"] * known["train_flops"]
    return found


def frontier_table(rows: list[FrontierRow], width: int = 160) -> Table:
    """Rows of one corpus: the figures that some row has, as many of the most important as `width` has room for."""
    heads, names = _heads(rows), known_figures(rows)
    left = width - 2 - sum(2 + max(map(len, [head, *texts])) for head, texts in heads.items())
    widths = [2 + max(len(COLUMN[name].title), *(len(written_mean(row, name)) for row in rows)) for name in names]
    while len(names) > 1 and sum(widths[: len(names)]) > left:
        names = names[:-1]
    notes = "; ".join(_notes(heads, names)) or None
    table = Table(
        title=rows[0].corpus, caption=notes, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for head in heads:
        table.add_column(head, justify="left" if head in ("experiment", "decoder") else "right", no_wrap=True)
    for name in names:
        table.add_column(COLUMN[name].title, justify="right", no_wrap=True)
    for k, row in enumerate(rows):
        table.add_row(*(texts[k] for texts in heads.values()), *(written_mean(row, name) for name in names))
    return table


def frontier_markdown(rows: list[FrontierRow]) -> str:
    """The same table as Markdown, with every figure that some row has, and what its heads mean."""
    heads, names = _heads(rows), known_figures(rows)
    titles = [*heads, *(COLUMN[name].title for name in names)]
    cells = [
        [*(texts[k] for texts in heads.values()), *(written_mean(row, name) for name in names)]
        for k, row in enumerate(rows)
    ]
    notes = "; ".join(_notes(heads, names))
    return as_markdown(titles, cells, left=2) + (f"\n\n{notes}." if notes else "")


def _heads(rows: list[FrontierRow]) -> dict[str, list[str]]:
    """The first columns; NFE only where forward passes were counted."""
    heads = {"experiment": [row.experiment for row in rows], "decoder": [row.decoder for row in rows]}
    if any(row.nfe for row in rows):
        heads["NFE"] = [nfe_cell(row.nfe) for row in rows]
    return heads | {"seeds": [str(row.seeds) for row in rows]}


def _notes(heads: dict[str, list[str]], names: list[str]) -> list[str]:
    own = [COLUMN[name].note for name in names if COLUMN[name].note]
    return [NFE, *own] if "NFE" in heads else own


def frontier_figure(rows: list[FrontierRow], *, speed: bool = True) -> Figure:
    """A line of panels for each corpus: its qualities against NFE, then with `speed` its first quality against tokens/s."""
    corpora = list(dict.fromkeys(row.corpus for row in rows))
    figure = Figure(figsize=(13.5, 4.2 * len(corpora)), layout="constrained")
    for part, corpus in zip(figure.subfigures(len(corpora), 1, squeeze=False)[:, 0], corpora, strict=True):
        own = [row for row in rows if row.corpus == corpus]
        shown = shown_qualities(own)
        main = next((name for name in PREFERRED if name in shown), None)
        if main is None:
            continue
        panels = [("nfe", name) for name in shown] + ([("tokens_per_s", main)] if speed else [])
        axes = part.subplots(1, len(panels), squeeze=False)[0]
        for axis, (cost, quality) in zip(axes, panels, strict=True):
            _panel(axis, own, cost, quality)
        part.suptitle(corpus, fontsize=11)
        handles, labels = axes[0].get_legend_handles_labels()
        part.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def shown_qualities(rows: list[FrontierRow]) -> list[str]:
    """At most three qualities to draw of one corpus."""
    # TV beside validity: a generator that always writes the same valid text is perfect in one and worst in the other
    known = [name for name in (*PREFERRED, "validity_none", "tv") if any(row.values.get(name) for row in rows)]
    return [name for name in known if name != "exact_match" or "validity" not in known][:3]


def _panel(axis: Any, rows: list[FrontierRow], cost: str, quality: str) -> None:
    lines: dict[tuple[str, str, str], list[FrontierRow]] = defaultdict(list)
    for row in rows:
        if row.mean(quality) is not None:
            lines[row.method, row.experiment, row.decoder].append(row)
    seen: dict[str, int] = defaultdict(int)
    for (method, experiment, decoder), own in lines.items():
        marker, colour = STYLE.get(method, ("s-", "#4a8f5a"))
        label = f"{decoder} ({experiment})" if len({row.experiment for row in rows}) > 1 else decoder
        shade = max(0.3, 1.0 - 0.25 * seen[method])
        if method == "student":  # each has a colour of its own, the same in every panel
            colour, shade = STUDENT_COLOURS[seen[method] % len(STUDENT_COLOURS)], 1.0
        seen[method] += 1
        if method == "control":
            dashes = marker if seen[method] == 1 else ":"
            axis.axhline(own[0].mean(quality), linestyle=dashes, color=colour, alpha=shade, label=label)
            continue
        own.sort(key=lambda row: row.nfe)
        x = [row.nfe if cost == "nfe" else row.mean(cost) for row in own]
        errors = [row.half_width(quality) or 0.0 for row in own]
        size = 9 if marker.startswith("*") else 5
        style = {
            "fmt": marker.rstrip("-") + "-",
            "color": colour,
            "alpha": shade,
            "capsize": 2,
            "markersize": size,
            "label": label,
        }
        axis.errorbar(x, [row.mean(quality) for row in own], yerr=errors, **style)
    axis.set_xscale("log", base=2 if cost == "nfe" else 10)
    axis.xaxis.set_minor_formatter(NullFormatter())
    if cost == "nfe":
        axis.xaxis.set_major_formatter("{x:g}")
    scale_quality(axis, quality)
    axis.set_xlabel("forward passes per text (NFE)" if cost == "nfe" else "response tokens per second")
    axis.set_title("TV (0 is the truth)" if quality == "tv" else COLUMN[quality].title, fontsize=10)
    axis.grid(alpha=0.25)


def known_figures(rows: list[FrontierRow]) -> list[str]:
    """Names of the figures that some row has, the most important first."""
    return [column.name for column in COLUMNS if any(row.values.get(column.name) for row in rows)]


def written_mean(row: FrontierRow, name: str) -> str:
    """A figure's mean over seeds with its 95 % interval; "-" where it was not measured."""
    if name in WORST and row.values.get(name):
        return written(WORST[name](row.values[name]), COLUMN[name].form)
    mean, half, form = row.mean(name), row.half_width(name), COLUMN[name].form
    interval = "" if half is None or name == "tokens_per_s" else f" ± {written(half, form)}"
    known = len(row.values.get(name, []))
    # such as a goal that some seeds did not reach
    return written(mean, form) + interval + (f" ({known} of {row.seeds})" if 0 < known < row.seeds else "")
