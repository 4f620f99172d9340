"""`mode=report`: gain of plans against their rate, bits a text, for every run that measured both.

A run named <family>_<size> is a point of its family: concept_rate/leading_2 is the family concept_rate/leading at size 2.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

from matplotlib.figure import Figure

COLOURS = ("#c8553d", "#3b6ea5", "#4a8f5a", "#8e5ea2", "#d39b2a", "#1f9aa5")


class Measured(Protocol):
    """A row of the report."""

    corpus: str
    experiment: str

    def mean(self, name: str) -> float | None: ...
    def half_width(self, name: str) -> float | None: ...


def rate_figure(rows: Sequence[Measured]) -> Figure | None:
    """A panel for each corpus; None where no run measured both. On the line a bit of plan saves a bit of text."""
    known = [row for row in rows if row.mean("rate_bits") is not None and row.mean("gain_bits") is not None]
    corpora = list(dict.fromkeys(row.corpus for row in known))
    if not known:
        return None
    figure = Figure(figsize=(6.6 * len(corpora), 4.6), layout="constrained")
    for axis, corpus in zip(figure.subplots(1, len(corpora), squeeze=False)[0], corpora, strict=True):
        families = defaultdict(list)
        for row in known:
            if row.corpus == corpus:
                families[family_and_size(row.experiment)[0]].append(row)
        for k, (family, own) in enumerate(families.items()):
            own.sort(key=lambda row: row.mean("rate_bits") or 0.0)
            rate, gain = ([row.mean(name) for row in own] for name in ("rate_bits", "gain_bits"))
            errors = [[row.half_width(name) or 0.0 for row in own] for name in ("rate_bits", "gain_bits")]
            style = {"marker": "o", "capsize": 2, "color": COLOURS[k % len(COLOURS)], "label": family}
            axis.errorbar(rate, gain, xerr=errors[0], yerr=errors[1], **style)
            for row, x, y in zip(own, rate, gain, strict=True):
                size = family_and_size(row.experiment)[1]
                axis.annotate(size, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        most = max(row.mean("rate_bits") or 0.0 for row in known if row.corpus == corpus)
        axis.plot([0, most], [0, most], ":", color="#7a7a7a", label="η = 1")
        axis.axhline(0, linewidth=0.6, color="#7a7a7a")
        axis.set_xlabel("rate: -log2 p(plan given prompt), bits a text")
        axis.set_ylabel("gain: bits of the text that the plan saves")
        axis.set_title(corpus, fontsize=11)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.25)
    return figure


def family_and_size(experiment: str) -> tuple[str, str]:
    """A run's name split at its last underscore, where a digit follows that."""
    family, _, size = experiment.rpartition("_")
    return (family, size) if family and size[:1].isdigit() else (experiment, "")
