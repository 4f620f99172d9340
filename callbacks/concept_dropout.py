"""NLL and reconstruction of texts when a growing share of their plans' concepts is hidden from the executor."""

from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Generator

from callbacks.monitors.rows import first_rows, in_parts
from models.functional.per_token import per_token
from models.interfaces.probes import RebuildProbe, find_probe
from reporting.concept_dropout import dropout_figure, dropout_table
from reporting.console import report_console


class ConceptDropout(Callback):
    """At a test, on its first `rows` texts: a table, `concept_dropout.png` in `folder`, and figures for the record.

    nll_dropped_<percent> (nats a token), reconstruction_dropped_<percent>. Larger shares hide all that smaller ones hide, so
    that the curve rises where the plan is used.
    """

    def __init__(self, folder: str, rows: int = 256, steps: int = 10) -> None:
        self.folder, self.rows, self.steps = Path(folder), rows, steps

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if find_probe(pl_module, RebuildProbe) is None:
            return
        curve = self.curve(trainer, pl_module)
        for percent, nll, _, rebuilt in curve:
            pl_module.figures.add({f"nll_dropped_{percent}": nll, f"reconstruction_dropped_{percent}": rebuilt})
        if not trainer.is_global_zero:
            return
        figure = dropout_figure(curve)
        report_console().print(dropout_table(curve))
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
