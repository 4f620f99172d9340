"""Gain of plans on a corpus of unknown likelihood: measured against a model that reads the prompt and no plan."""

import math

from lightning import Callback, LightningModule, Trainer

from models.functional.errors import UsageError
from models.functional.plan_information import efficiency


class PlanGain(Callback):
    """Adds gain_bits and efficiency on the test texts to the figures of a module with a meter of plans.

    nll: that model's nats a token on the same test texts, from the record of its run; None adds nothing. A model that is
    weaker than the executor makes η look too high.
    """

    def __init__(self, nll: float | None = None) -> None:
        if nll is not None and not nll > 0:
            raise UsageError(
                f"callbacks.gain.nll={nll} must be above 0; it is the nll in the record of a model without plans"
            )
        self.nll = nll

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        padded = getattr(getattr(pl_module, "options", None), "executor", None) == "parallel"
        if self.nll is not None and padded and not getattr(trainer.datamodule, "end_padding", True):
            raise UsageError(
                f"callbacks.gain.nll={self.nll} is a token up to a text's end, and module.executor=parallel counts all columns "
                "of a row; type callbacks.gain.nll=null"
            )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.nll is None or not hasattr(pl_module, "meter"):
            return
        known = pl_module.meter.compute()
        if "rate_bits" not in known:
            return
        gain = (self.nll - known["nll"]) * known["tokens_a_text"] / math.log(2)
        found = {"nll_baseline": self.nll, "gain_bits": gain, "efficiency": efficiency(gain, 0.0, known["rate_bits"])}
        pl_module.figures.add(found)
