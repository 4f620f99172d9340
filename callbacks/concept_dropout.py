"""What a text costs, and whether it is rebuilt, when a growing share of its plan's concepts is hidden from the executor."""

from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch import Generator

from callbacks.monitors.rows import first_rows, in_parts
from models.functional.per_token import per_token
from models.interfaces.probes import RebuildProbe, find_probe
from reporting.console import report_console


class ConceptDropout(Callback):
    """At a test, on its first `rows` texts: a table, `concept_dropout.png` in `folder`, and figures for the record.

    nll_dropped_<percent> (nats a token), rebuilt_dropped_<percent>. Larger shares hide what smaller ones hid and more, so
    that where the plan is used the curve rises.
    """

    def __init__(self, folder: str, rows: int = 256, steps: int = 10) -> None:
        self.folder, self.rows, self.steps = Path(folder), rows, steps

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if find_probe(pl_module, RebuildProbe) is None:
            return
        curve = self.curve(trainer, pl_module)
        for percent, nll, _, rebuilt in curve:
            pl_module.figures.add({f"nll_dropped_{percent}": nll, f"rebuilt_dropped_{percent}": rebuilt})
        if not trainer.is_global_zero:
            return
        figure = _figure(curve)
        report_console().print(_table(curve))
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_figure"):
                logger.experiment.add_figure("concept_dropout", figure, trainer.global_step)
        if not trainer.fast_dev_run:
            self.folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.folder / "concept_dropout.png", dpi=130)

    @torch.no_grad()
    def curve(self, trainer: Trainer, module: LightningModule) -> list[tuple[int, float, float, float]]:
        """(percent hidden, NLL, half its interval, share rebuilt), the shares evenly from 0 to 100."""
        rows = first_rows(trainer, module, "test", self.rows)
        generator = Generator(device=module.device).manual_seed(0)
        probe = find_probe(module, RebuildProbe)
        batch = probe.probe_batch(rows, generator)
        slots = next(iter(batch.condition.values())).shape
        order = torch.rand(slots, generator=generator, device=module.device)
        found = []
        for k in range(self.steps + 1):
            hidden = batch.under(probe.drop_concepts(batch, order, k / self.steps))
            nll = per_token(in_parts(probe.nll, rows, hidden), batch.counts)
            rebuilt = in_parts(probe.rebuilt, rows, hidden).double().mean().item()
            found.append((round(100 * k / self.steps), nll.mean, nll.half or 0.0, rebuilt))
        return found


def _table(curve: list[tuple[int, float, float, float]]) -> Table:
    table = Table(title="concepts hidden from the executor", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("hidden", "nats/token", "±", "rebuilt"):
        table.add_column(title, justify="right")
    for percent, nll, half, rebuilt in curve:
        table.add_row(f"{percent} %", f"{nll:.4f}", f"{half:.4f}", f"{rebuilt:.3f}")
    return table


def _figure(curve: list[tuple[int, float, float, float]]) -> Figure:
    percent, nll, half, rebuilt = zip(*curve, strict=True)
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    costs, shares = figure.subplots(1, 2)
    costs.errorbar(percent, nll, yerr=half, fmt="o-", color="#3b6ea5", capsize=2)
    costs.set_title("NLL of the text, nats a token", fontsize=10)
    shares.plot(percent, rebuilt, "o-", color="#c8553d")
    shares.set_title("texts rebuilt from their plan", fontsize=10)
    shares.set_ylim(-0.03, 1.05)
    for axis in (costs, shares):
        axis.set_xlabel("concepts hidden, %")
        axis.grid(alpha=0.25)
    return figure
