"""Table and figure of texts whose plans are partly hidden."""

from matplotlib.figure import Figure
from rich import box
from rich.table import Table


def dropout_table(curve: list[tuple[int, float, float, float]]) -> Table:
    """Rows of (percent hidden, NLL, half its 95 % interval, share reconstructed)."""
    table = Table(title="concepts hidden from the executor", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("hidden", "NLL", "±", "reconstructed"):
        table.add_column(title, justify="right")
    for percent, nll, half, rebuilt in curve:
        table.add_row(f"{percent} %", f"{nll:.4f}", f"{half:.4f}", f"{rebuilt:.3f}")
    return table


def dropout_figure(curve: list[tuple[int, float, float, float]]) -> Figure:
    """NLL and share reconstructed against the share of concepts that are hidden."""
    percent, nll, half, rebuilt = zip(*curve, strict=True)
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    costs, shares = figure.subplots(1, 2)
    costs.errorbar(percent, nll, yerr=half, fmt="o-", color="#3b6ea5", capsize=2)
    costs.set_title("NLL, nats a token", fontsize=10)
    shares.plot(percent, rebuilt, "o-", color="#c8553d")
    shares.set_title("share of texts reconstructed", fontsize=10)
    shares.set_ylim(-0.03, 1.05)
    for axis in (costs, shares):
        axis.set_xlabel("concepts hidden, %")
        axis.grid(alpha=0.25)
    return figure
