"""The exact likelihood of texts beside its bound, and the likelihood of texts given the plan of their attributes."""

import torch
from lightning import LightningModule, Trainer
from torch import Generator, Tensor

from callbacks.monitors.rows import RowMonitor, in_parts
from models.interfaces.probes import MixtureProbe


class ExactLikelihood(RowMonitor):
    """Of the first `rows` test texts, nats a token; where all plans can be listed (at most 256).

    The law is that of plans and texts at temperature 1, written without refinements, whose law is another one.

    nll_exact: -log p(x | u), the sum over all plans. nll_exact_bound: -log p(x | z) - log p(z | u) of the texts' own plans.
    nll_true_plan: -log p(x | z) of the plans of the attributes that the corpus knows of the texts: each type has the
    code that goes with its attribute's value; nll_own_plan: of the texts' own plans.
    """

    offers = MixtureProbe

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of a test alone."""

    @torch.no_grad()
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.attributes_of = getattr(trainer.datamodule, "attributes_of", None)
        super().on_test_start(trainer, pl_module)

    def measure(self, probe: MixtureProbe, rows: dict[str, Tensor], generator: Generator) -> dict[str, float]:
        # 1. the sum over all plans
        log_p = probe.log_prob(rows)
        if log_p is None:
            return {}
        # 2. the texts' own plans
        batch = probe.probe_batch(rows, generator)
        tokens = batch.text.numel()
        found = {"nll_exact": -log_p.sum(), "nll_exact_bound": in_parts(probe.bound, rows, batch).sum()}
        found["nll_own_plan"] = in_parts(probe.nll, rows, batch).sum()
        # 3. the plans of the attributes that are known
        attributes = None if self.attributes_of is None else self.attributes_of(rows)
        given = None if attributes is None else probe.given_attributes(batch, attributes)
        if given is not None:
            found["nll_true_plan"] = in_parts(probe.nll, rows, batch.under(given)).sum()
        return {name: float(value) / tokens for name, value in found.items()}
