"""Quality against tokens per forward pass (TPF), and the area under it (AUP), of one run or of all runs of `mode=report`."""

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from reporting.figure import LOWER_IS_BETTER, PREFERRED, STYLE, TITLES
from reporting.intervals import half_width
from reporting.parallelism import Point, accuracy_under_parallelism, not_dominated
from reporting.point_labels import PointLabel, place_labels
from reporting.record import newest_rows

PERCENT = {
    "validity": 100.0,
    "slot_accuracy": 100.0,
    "exact_match": 100.0,
    "bleu": 1.0,
}  # accuracy -> its factor to percent
FURTHER_COLOURS = ("#8e5ea2", "#4a8f5a", "#d39b2a", "#1f9aa5", "#7a5230")  # of further curves of a method
COMPARED = ("teacher", "student")  # methods whose decoders generate with a network


@dataclass
class TpfCurve:
    """The decoders of one method in one experiment.

    seeds: for each seed, (TPF, quality) of each (decoder, NFE). y_max: the highest quality that a decoder of any experiment
    reaches on the corpus.
    """

    corpus: str
    experiment: str
    method: str
    quality: str
    seeds: dict[int, dict[tuple[str, float], Point]] = field(default_factory=lambda: defaultdict(dict))
    y_max: float = 0.0

    def points(self) -> dict[tuple[str, float], Point]:
        """(TPF, quality) of each (decoder, NFE), mean over seeds."""
        found = defaultdict(list)
        for own in self.seeds.values():
            for decoder, point in own.items():
                found[decoder].append(point)
        return {decoder: (fmean(x for x, _ in p), fmean(y for _, y in p)) for decoder, p in found.items()}

    def front(self) -> list[Point]:
        """The points that no other one of the curve equals or exceeds in both, from the smallest TPF on."""
        sign = -1 if self.quality in LOWER_IS_BETTER else 1
        return [(x, sign * y) for x, y in not_dominated([(x, sign * y) for x, y in self.points().values()])]

    def aup(self) -> list[float]:
        """AUP of each seed with two decoders or more, in percent times TPF; none where quality is no accuracy.

        It is that of the points which no other one dominates: a decoder that nobody would choose does not count against its
        method. d3LLM takes all points, which are the same where quality falls with TPF.
        """
        factor = PERCENT.get(self.quality)
        if factor is None:
            return []
        seeds = [[(x, factor * y) for x, y in own.values()] for own in self.seeds.values() if len(own) > 1]
        return [accuracy_under_parallelism(not_dominated(points), factor * self.y_max) for points in seeds]

    def aup_written(self) -> str:
        """Mean over seeds and 95 % interval; empty where there is none."""
        values = self.aup()
        half = half_width(values)
        return f"{fmean(values):.1f}{'' if half is None else f' ± {half:.1f}'}" if values else ""


def tpf_curves(records: Iterable[dict[str, Any]]) -> list[TpfCurve]:
    """One curve for each method of each experiment on a corpus, against the first of PREFERRED that the corpus' rows know.

    Runs of q* have none: their rows are of two models and of exact drafts, not of one model that trades quality for speed.
    """
    own_models = [r for r in records if not any("speedup_vs_naive" in row["cost"] for row in r["rows"])]
    rows = {key: row for key, row in newest_rows(own_models).items() if key[2] in COMPARED}
    known: dict[str, set[str]] = defaultdict(set)
    for (corpus, *_), row in rows.items():
        known[corpus] |= {name for name, value in row["quality"].items() if value is not None}
    main = {corpus: next((name for name in PREFERRED if name in names), "") for corpus, names in known.items()}
    curves: dict[tuple, TpfCurve] = {}
    for (corpus, experiment, method, decoder, nfe, seed), row in rows.items():
        tpf, quality = row["cost"].get("tokens_per_forward"), row["quality"].get(main[corpus])
        if tpf is not None and quality is not None:
            labels = (corpus, experiment, method)
            curve = curves.setdefault(labels, TpfCurve(*labels, main[corpus]))
            curve.seeds[seed][decoder, nfe] = (tpf, quality)
    found = sorted(curves.values(), key=lambda curve: (curve.corpus, curve.experiment))
    for curve in found:
        same = [other for other in found if other.corpus == curve.corpus]
        curve.y_max = max(y for other in same for own in other.seeds.values() for _, y in own.values())
    return found


def aup_of(record: dict[str, Any]) -> dict[str, Any] | None:
    """A record's "aup"; None where no method has two decoders, or quality is no accuracy."""
    curves = [curve for curve in tpf_curves([record]) if curve.aup()]
    if not curves:
        return None
    methods = {curve.method: curve.aup()[0] for curve in curves}
    return {"quality": curves[0].quality, "y_max": curves[0].y_max, "methods": methods}


def aup_sentences(curves: list[TpfCurve]) -> dict[str, str]:
    """{corpus: the AUP of each experiment's methods}, of the corpora that have some."""
    said: dict[str, str] = {}
    for curve in curves:
        if written := curve.aup_written():
            begin = f"AUP of {_title(curve)} (y_max {PERCENT[curve.quality] * curve.y_max:.1f} %): "
            one = f"{curve.experiment} {curve.method} {written}"
            said[curve.corpus] = f"{said[curve.corpus]}, {one}" if curve.corpus in said else begin + one
    return said


def tpf_figure(curves: list[TpfCurve]) -> Figure | None:
    """A panel for each corpus with a method of two decoders or more: all points, and a line along those not dominated."""
    corpora = list(dict.fromkeys(curve.corpus for curve in curves if len(curve.points()) > 1))
    if not corpora:
        return None
    figure = Figure(figsize=(6.4 * len(corpora), 5.2), layout="constrained")
    panels: list[tuple[Any, list[PointLabel]]] = []
    for axis, corpus in zip(figure.subplots(1, len(corpora), squeeze=False)[0], corpora, strict=True):
        own = [curve for curve in curves if curve.corpus == corpus]
        further = itertools.cycle(FURTHER_COLOURS)
        drawn: set[str] = set()
        labels: list[PointLabel] = []
        for curve in own:
            marker, colour = STYLE[curve.method]
            labels += _draw(axis, curve, marker[0], next(further) if curve.method in drawn else colour)
            drawn.add(curve.method)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("generated tokens per forward pass (TPF)")
        axis.set_ylabel(_title(own[0]))
        axis.set_title(corpus, fontsize=11)
        axis.set_yscale("log" if own[0].quality in LOWER_IS_BETTER else "linear")
        axis.margins(x=0.1, y=0.12)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
        axis.grid(alpha=0.25)
        panels.append((axis, labels))
    for axis, labels in panels:  # once every panel is there, for each takes a part of the figure
        place_labels(axis, labels)
    return figure


def _draw(axis: Any, curve: TpfCurve, marker: str, colour: str) -> list[PointLabel]:
    """Draw a curve; the labels of its points that no other one dominates."""
    points, front, written = curve.points(), curve.front(), curve.aup_written()
    label = f"{curve.experiment}, {curve.method}{f': AUP {written}' if written else ''}"
    style = {"color": colour, "markersize": 9 if marker == "*" else 4, "label": label}
    axis.plot(*zip(*front, strict=True), "-", color=colour, linewidth=1)
    axis.plot(*zip(*points.values(), strict=True), marker, **style)
    return [
        PointLabel(decoder.removeprefix(f"{curve.method}, ") + (f", NFE {nfe}" if nfe else ""), point, colour)
        for (decoder, nfe), point in points.items()
        if point in front
    ]


def _title(curve: TpfCurve) -> str:
    return TITLES.get(curve.quality, curve.quality.replace("_", " "))
