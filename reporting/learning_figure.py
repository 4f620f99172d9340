"""The figure of models in `mode=report`: NLL above the data's own, against training tokens and FLOPs."""

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from reporting.intervals import half_width

# cost -> (title, unit)
COSTS = {"tokens": ("million training tokens", 1e6), "flops": ("training TFLOP", 1e12)}


@dataclass
class LearningCurve:
    """One experiment's validation likelihoods; `points` holds, for each number of steps, one value a seed of each name.

    Names: tokens, flops (where the record knows what a step takes), nll, and above: nll minus the texts' own.
    """

    corpus: str
    experiment: str
    bound: bool
    points: dict[float, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    @property
    def seeds(self) -> int:
        return max(len(point["nll"]) for point in self.points.values())

    def shared(self) -> list[dict[str, list[float]]]:
        """The points that every seed has, by steps."""
        return [point for _, point in sorted(self.points.items()) if len(point["nll"]) == self.seeds]


def learning_curves(records: list[dict[str, Any]]) -> list[LearningCurve]:
    """The curves of all records, oldest first; a run repeated with the same seed replaces the earlier one."""
    newest: dict[tuple, dict] = {}
    for record in records:
        for row in record["rows"]:
            if row.get("curve"):
                newest[record["data"]["name"], record["experiment"], record["seed"]] = row
    curves: dict[tuple, LearningCurve] = {}
    for (corpus, experiment, _), row in newest.items():
        curve, quality = row["curve"], row["quality"]
        own = curves.setdefault((corpus, experiment), LearningCurve(corpus, experiment, "nll_bound" in quality))
        for k, steps in enumerate(curve["steps"]):
            point = own.points[steps]
            point["tokens"].append(curve["tokens"][k])
            point["nll"].append(curve["nll"][k])
            if "nll_truth" in curve:
                point["above"].append(curve["nll"][k] - curve["nll_truth"][k])
            if quality.get("flops_per_step"):
                point["flops"].append(steps * quality["flops_per_step"])
    return list(curves.values())


def learning_figure(curves: list[LearningCurve]) -> Figure:
    """A line of panels for each corpus: its likelihoods against tokens and against FLOPs, mean and 95 % interval over seeds."""
    corpora = list(dict.fromkeys(curve.corpus for curve in curves))
    figure = Figure(figsize=(12.5, 4.8 * len(corpora)), layout="constrained")
    for part, corpus in zip(figure.subfigures(len(corpora), 1, squeeze=False)[:, 0], corpora, strict=True):
        own = [curve for curve in curves if curve.corpus == corpus]
        axes = part.subplots(1, len(COSTS), squeeze=False)[0]
        for axis, cost in zip(axes, COSTS, strict=True):
            _panel(axis, own, cost)
        handles, labels = axes[0].get_legend_handles_labels()
        part.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        part.suptitle(corpus, fontsize=11)
    return figure


def _panel(axis: Any, curves: list[LearningCurve], cost: str) -> None:
    quality = "above" if all(point["above"] for curve in curves for point in curve.shared()) else "nll"
    title, unit = COSTS[cost]
    for curve in curves:
        points = [point for point in curve.shared() if point[cost] and point[quality]]
        if not points:
            continue
        x = [fmean(point[cost]) / unit for point in points]
        y = [fmean(point[quality]) for point in points]
        spread = [half_width(point[quality]) or 0.0 for point in points]
        label = curve.experiment + (" (bound)" if curve.bound else "")
        (line,) = axis.plot(x, y, "o--" if curve.bound else "o-", markersize=3, label=label)
        low, high = ([value + sign * half for value, half in zip(y, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if quality == "above":  # an unbiased estimate of a bound can fall a little below the data's own
        axis.set_yscale("symlog", linthresh=0.01)
        axis.axhline(0.0, color="#7a7a7a", linewidth=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(title)
    axis.set_title("NLL above the data's own, nats a token" if quality == "above" else "NLL, nats a token", fontsize=10)
    axis.grid(alpha=0.25)
