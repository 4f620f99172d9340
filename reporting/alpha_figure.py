"""The figure of q_α between two models: both divergences over α, and a star where they are equal."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

STAR = "#c8553d"


def alpha_figure(record: dict[str, Any]) -> Figure | None:
    """Of a run's record; None where the run measured no such curve."""
    curve = record.get("alpha_curve")
    if not curve:
        return None
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axis = figure.subplots()
    star = curve["alpha_star"], curve["kl_star"]
    draw_divergences(axis, curve["alphas"], curve["kl_theta"], curve["kl_target"], star)
    axis.set_ylabel("nats, mean over positions")
    axis.set_title(f"{record['experiment']} on {record['data']['name']}: α* = {star[0]:.3f}", fontsize=10)
    axis.legend(fontsize=8)
    return figure


def draw_divergences(
    axis: Axes,
    alphas: Sequence[float],
    kl_theta: Sequence[float],
    kl_target: Sequence[float],
    star: tuple[float, float],
) -> None:
    """Both curves, and a star at (α*, their common value)."""
    axis.plot(alphas, kl_theta, color="#3b6ea5", label="KL(q_α‖π_θ)")
    axis.plot(alphas, kl_target, color="#4a8f5a", label="KL(q_α‖π_t)")
    axis.plot(*star, "*", color=STAR, markersize=13, label="α*: both are equal")
    axis.set_xlabel("α")
    axis.grid(alpha=0.25)
