"""Monitor 1: how much dearer a text is when it has to be written from a wrong condition. Near 0: the condition is ignored."""

from typing import Any

from lightning import LightningModule, Trainer
from torch import Generator, Tensor

from callbacks.monitors.rows import in_parts
from callbacks.monitors.texts import TextMonitor
from models.functional.exchange import derangement, nearest_other
from models.functional.per_token import by_position, per_token
from models.interfaces.probe_batch import ProbeBatch, rows_at
from reporting.console import report_console

KINDS = ("shuffle", "blank", "random", "nearest")


class ExchangeMonitor(TextMonitor):
    """ΔNLL = NLL(x given a wrong condition) - NLL(x given its own), nats a token.

    dnll_shuffle: that of another text, none its own; dnll_blank: one that says nothing; dnll_random: a random one of the same
    length; dnll_nearest: the nearest that differs. nll_given_own: the text under its own. dnll_shuffle_low and _high: a 95 %
    interval over texts; dnll_shuffle_at_<place>: of `width` positions from there on, with their intervals.
    Whether the condition is used is read off the shuffle: a blank one may hurt because it is unlike anything seen.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        figures = pl_module.figures.values if getattr(pl_module, "figures", None) is not None else {}
        if trainer.is_global_zero and "dnll_shuffle" in figures:
            report_console().print(self.in_words(figures), highlight=False, soft_wrap=True)

    @staticmethod
    def in_words(figures: dict[str, float]) -> str:
        """The shuffle's gap, whole and from each place on, with its interval where it has one."""
        names = [name for name in figures if name.startswith("dnll_shuffle") and not name.endswith(("_low", "_high"))]
        parts = []
        for name in names:
            low, high = (figures.get(f"{name}_{end}") for end in ("low", "high"))
            place = name.removeprefix("dnll_shuffle_at_") if name != "dnll_shuffle" else "all"
            parts.append(f"{place}: {figures[name]:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if low is not None else ""))
        return "nats a token more under another text's condition, by the place from which on (95 %): " + ", ".join(
            parts
        )

    def measure(self, probe: Any, rows: dict[str, Tensor], generator: Generator) -> dict[str, float]:
        batch = probe.probe_batch(rows, generator)
        own = in_parts(probe.nll, rows, batch)
        base = per_token(own, batch.counts)
        figures = {} if base is None else {"nll_given_own": base.mean}
        for kind in KINDS if base is not None else ():
            wrong = self._wrong(probe, batch, kind, generator)
            if wrong is None:
                continue
            gap = in_parts(probe.nll, rows, batch.under(wrong)) - own
            figures |= interval(f"dnll_{kind}", per_token(gap, batch.counts), whole=kind == "shuffle")
            if kind == "shuffle":
                for place, value in by_position(gap, batch.counts, self.width).items():
                    figures |= interval(f"dnll_shuffle_at_{place}", value)
        return figures

    @staticmethod
    def _wrong(probe: Any, batch: ProbeBatch, kind: str, generator: Generator) -> dict[str, Tensor] | None:
        if kind == "shuffle":
            return rows_at(batch.condition, derangement(len(batch.text), generator))
        if kind == "nearest":
            features = probe.condition_features(batch)
            return None if features is None else rows_at(batch.condition, nearest_other(features))
        return probe.corrupt_condition(batch, kind, generator)

    def charts(self) -> dict[str, list[str]]:
        return {
            "ΔNLL": [f"monitor/dnll_{kind}$" for kind in KINDS],
            "ΔNLL by position": ["monitor/dnll_shuffle_at_[0-9]+$"],
        }


def interval(name: str, value: Any, whole: bool = True) -> dict[str, float]:
    """A mean under its name and, where `whole`, the ends of its interval under `_low` and `_high`."""
    found = {name: value.mean}
    if whole and value.half is not None:
        found |= {f"{name}_low": value.mean - value.half, f"{name}_high": value.mean + value.half}
    return found
