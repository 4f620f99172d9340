"""The figure of a run: quality against the number of forward passes (NFE)."""

from typing import Any

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")

STYLE = {"teacher": ("o-", "#3b6ea5"), "student": ("*-", "#c8553d"), "control": ("--", "#7a7a7a")}
TITLES = {"validity_part": "validity, part of the plan prompted", "validity_none": "validity, no prompt"}
PREFERRED = ("validity", "exact_match", "slot_accuracy", "bleu", "judge_perplexity", "text_entropy")
UNBOUNDED = ("bleu", "judge_perplexity", "text_entropy")
LOWER_IS_BETTER = ("judge_perplexity",)


def has_quality(record: dict[str, Any]) -> bool:
    """Whether there is something to draw: a likelihood alone is no point over forward passes."""
    return any(row["quality"].get(name) is not None for row in record["rows"] for name in PREFERRED)


def quality_figure(record: dict[str, Any]) -> Figure:
    """One panel for each kind of quality that the record knows: multi-step decoders as lines, controls as levels."""
    rows = record["rows"]
    names = [n for n in PREFERRED if any(row["quality"].get(n) is not None for row in rows)]
    by_prompt = [
        n for n in ("validity_part", "validity_none") if any(row["quality"].get(n) is not None for row in rows)
    ]
    panels = (names + by_prompt) or ["validity"]
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, name in zip(axes, panels, strict=True):
        _panel(axis, rows, name)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=8)
    figure.suptitle(f"{record['experiment']} on {record['data']['name']}", fontsize=11)
    return figure


def _panel(axis, rows: list[dict], name: str) -> None:
    decoders = dict.fromkeys((row["method"], row["decoder"]) for row in rows)
    colours: dict[str, Any] = {}
    for method, decoder in decoders:
        own = [r for r in rows if r["decoder"] == decoder and r["quality"].get(name) is not None]
        if not own:
            continue
        marker, colour = STYLE.get(method, ("s-", "#4a8f5a"))
        alpha = 1.0 if colours.setdefault(method, decoder) == decoder else 0.55
        if method == "control":
            axis.axhline(own[0]["quality"][name], linestyle="--" if alpha == 1.0 else ":", color=colour, label=decoder)
            continue
        x, y = [r["nfe"] for r in own], [r["quality"][name] for r in own]
        intervals = [r["ci95"].get(name) or (v, v) for r, v in zip(own, y, strict=True)]
        errors = [[max(0.0, v - low) for v, (low, _) in zip(y, intervals, strict=True)],
                  [max(0.0, high - v) for v, (_, high) in zip(y, intervals, strict=True)]]  # fmt: skip
        axis.errorbar(x, y, yerr=errors, fmt=marker, color=colour, alpha=alpha, label=decoder, capsize=2,
                      markersize=11 if marker.startswith("*") else 5)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("forward passes per text (NFE)")
    axis.set_title(TITLES.get(name, name.replace("_", " ")), fontsize=10)
    scale_quality(axis, name)
    axis.grid(alpha=0.25)


def scale_quality(axis: Any, name: str) -> None:
    """Shares from 0 to 1; a perplexity in powers; other figures as they come."""
    if name == "judge_perplexity":
        axis.set_yscale("log")
    elif name not in UNBOUNDED:
        axis.set_ylim(-0.03, 1.05)
