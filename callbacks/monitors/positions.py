"""Monitor 8: NLL by position. A plan that is used makes all of a text cheaper, one that only opens it the first words."""

from typing import Any

from torch import Generator, Tensor

from callbacks.monitors.rows import in_parts
from callbacks.monitors.texts import TextMonitor
from models.functional.per_token import by_position


class PositionMonitor(TextMonitor):
    """nll_at_<place>: nats a token of `width` positions from there on, each text under its own condition."""

    def measure(self, probe: Any, rows: dict[str, Tensor], generator: Generator) -> dict[str, float]:
        given = probe.probe_batch(rows, generator)
        nll = in_parts(probe.nll, rows, given)
        return {f"nll_at_{place}": value.mean for place, value in by_position(nll, given.counts, self.width).items()}

    def charts(self) -> dict[str, list[str]]:
        return {"NLL by position": ["monitor/nll_at_[0-9]+$"]}
