"""Monitor 8: NLL by position. Healthy: it falls everywhere. Only the first positions fall: the plan is used to begin texts."""

from typing import Any

from torch import Generator, Tensor

from callbacks.monitors.rows import in_parts
from callbacks.monitors.texts import TextMonitor
from models.functional.per_token import by_position


class PositionMonitor(TextMonitor):
    """nll_at_<position>: nats a token of `width` positions from there on, each text under its own condition."""

    cheap = True

    def measure(self, probe: Any, rows: dict[str, Tensor], generator: Generator) -> dict[str, float]:
        batch = probe.probe_batch(rows, generator)
        nll = in_parts(probe.nll, rows, batch)
        return {f"nll_at_{at}": value.mean for at, value in by_position(nll, batch.counts, self.width).items()}

    def charts(self) -> dict[str, list[str]]:
        return {"NLL by position": ["monitor/nll_at_[0-9]+$"]}
