"""Monitor 1: how much a text's NLL rises under a wrong condition. Near 0: the condition is ignored."""

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

    Wrong conditions: dnll_shuffle another text's, none its own; dnll_blank an empty one; dnll_random a random one of the same
    length; dnll_nearest the nearest that differs. nll_own_condition: the text under its own.
    dnll_shuffle_low, dnll_shuffle_high: a 95 % interval over texts. dnll_shuffle_at_<position>: of `width` positions from
    there on, with their intervals.
    dnll_shuffle shows whether the condition is used; an empty condition may hurt because training never had one.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        figures = pl_module.figures.values if getattr(pl_module, "figures", None) is not None else {}
        if trainer.is_global_zero and "dnll_shuffle" in figures:
            report_console().print(self.in_words(figures), highlight=False, soft_wrap=True)

    @staticmethod
    def in_words(figures: dict[str, float]) -> str:
        """dnll_shuffle of whole texts and of each range of positions, with its interval where it has one."""
        names = [name for name in figures if name.startswith("dnll_shuffle") and not name.endswith(("_low", "_high"))]
        parts = []
        for name in names:
            low, high = (figures.get(f"{name}_{end}") for end in ("low", "high"))
            at = name.replace("dnll_shuffle_at_", "from ") if name != "dnll_shuffle" else "all"
            parts.append(f"{at}: {figures[name]:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if low is not None else ""))
        return "ΔNLL under another text's condition, nats a token, by position (95 % interval): " + ", ".join(parts)

    def measure(self, probe: Any, rows: dict[str, Tensor], generator: Generator) -> dict[str, float]:
        batch = probe.probe_batch(rows, generator)
        own = in_parts(probe.nll, rows, batch)
        base = per_token(own, batch.counts)
        figures = {} if base is None else {"nll_own_condition": base.mean}
        for kind in KINDS if base is not None else ():
            wrong = self._wrong(probe, batch, kind, generator)
            if wrong is None:
                continue
            gap = in_parts(probe.nll, rows, batch.under(wrong)) - own
            figures |= interval(f"dnll_{kind}", per_token(gap, batch.counts), whole=kind == "shuffle")
            if kind == "shuffle":
                for at, value in by_position(gap, batch.counts, self.width).items():
                    figures |= interval(f"dnll_shuffle_at_{at}", value)
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
