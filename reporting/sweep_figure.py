"""A sweep in parallel coordinates: an axis for each option and each figure, a line for each run, coloured by the metric."""

import math
from typing import Any, Protocol

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

matplotlib.use("Agg")

MOST_TICKS = 8
NEAR = 0.04  # of an axis: labels nearer than this would cover each other
WIDE = 20.0  # a positive option whose largest value is this many times its smallest gets a logarithmic axis


class Swept(Protocol):
    """A run of the sweep."""

    options: dict[str, str]
    quality: dict[str, float]
    metric: str
    value: float | None


class Scale:
    """Where the values of one axis stand, from 0 to 1, and what is written beside them.

    Numbers stand by their size, or by its logarithm where they are spread wide; words, and options that not every run was
    given, evenly.
    """

    def __init__(self, values: list[Any]) -> None:
        numbers = [_number(value) for value in values]
        self.words = None if None not in numbers else list(dict.fromkeys(map(str, sorted(values, key=str))))
        known = (
            sorted({n for n in numbers if n is not None}) if self.words is None else [0.0, float(len(self.words) - 1)]
        )
        self.low, self.high = known[0], known[-1]
        self.wide = self.words is None and self.low > 0 and self.high / self.low >= WIDE
        self.shown = known if len(known) <= MOST_TICKS else [self.low, self.high]

    def __call__(self, value: Any) -> float:
        if self.words is not None:
            value = float(self.words.index(str(value)))
        value, low, high = (math.log(v) if self.wide else v for v in (float(value), self.low, self.high))
        return 0.5 if high == low else (value - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """(height, label)."""
        if self.words is not None:
            return [(self(word), word or "-") for word in self.words]
        found: list[tuple[float, str]] = []
        for value in self.shown:
            if not found or self(value) - found[-1][0] >= NEAR:
                found.append((self(value), f"{value:.4g}"))
        return found


def sweep_figure(runs: list[Swept], options: list[str], qualities: list[str]) -> Figure | None:
    """None where fewer than two runs have a value of the metric. runs: those that did not fail."""
    runs = [run for run in runs if run.value is not None]
    if len(runs) < 2:
        return None
    columns: dict[str, list[Any]] = {name: [run.options.get(name, "") for run in runs] for name in options}
    columns |= {name: [run.quality[name] for run in runs] for name in qualities if all(name in r.quality for r in runs)}
    columns[runs[0].metric] = [run.value for run in runs]
    scales = {name: Scale(values) for name, values in columns.items()}
    figure = Figure(figsize=(max(6.0, 1.9 * len(columns)), 4.2), layout="constrained")
    axis = figure.subplots()
    values = columns[runs[0].metric]
    norm = LogNorm if scales[runs[0].metric].wide else Normalize
    colour = ScalarMappable(norm(min(values), max(values)), "viridis")
    for k in range(len(runs)):
        heights = [scales[name](column[k]) for name, column in columns.items()]
        axis.plot(range(len(columns)), heights, "o-", color=colour.to_rgba(values[k]), alpha=0.85, markersize=4)
    for at, scale in enumerate(scales.values()):
        axis.axvline(at, color="#7a7a7a", linewidth=0.8, zorder=0)
        for height, label in scale.ticks():
            axis.annotate(label, (at, height), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axis.set_xticks(range(len(columns)), [name.replace("/", "/\n", 1) for name in columns], fontsize=8)
    axis.set_yticks([])
    axis.set_ylim(-0.06, 1.1)
    axis.set_xlim(-0.1, len(columns) - 0.6)
    for side in ("left", "right", "top", "bottom"):
        axis.spines[side].set_visible(False)
    figure.colorbar(colour, ax=axis, label=runs[0].metric, pad=0.01)
    return figure


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
