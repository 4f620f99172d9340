"""Monitor 5: how sure the planner is. Healthy: unsure at first, then sharp, then stable. Sharp from the start: collapsed."""

from typing import Any

import torch
from torch import Generator, Tensor

from callbacks.monitors.rows import CHUNK, RowMonitor
from models.functional.certainty import certainty
from models.interfaces.probe_batch import Choices, rows_at
from models.interfaces.probes import ChoiceProbe


class SharpnessMonitor(RowMonitor):
    """<who>_entropy (nats a choice), <who>_max_prob, <who>_entropy_share and <who>_usage: see `certainty`.

    A look between validations also has <who>_change: the share of choices whose most probable value is another than at the
    look before.
    """

    offers = ChoiceProbe
    cheap = True

    def __init__(self, rows: int = 256) -> None:
        super().__init__(rows)
        self._found: dict[str, Choices] = {}
        self._before: dict[str, Tensor] = {}

    def measure(self, probe: Any, rows: dict[str, Tensor], generator: Generator) -> dict[str, float]:
        parts = range(0, len(rows["input_ids"]), CHUNK)
        found = [probe.choices(rows_at(rows, slice(at, at + CHUNK)), generator) for at in parts]
        self._found = {
            who: Choices(*(torch.cat(columns) for columns in zip(*(part[who] for part in found), strict=True)))
            for who in found[0]
        }
        figures = {}
        for who, choices in self._found.items():
            figures |= {f"{who}_{name}": value for name, value in certainty(*choices).items()}
        return figures

    def look(self, trainer: Any, module: Any) -> dict[str, float]:
        figures = super().look(trainer, module)
        if not figures:
            return {}
        now = {who: choices.log_p.argmax(-1) for who, choices in self._found.items()}
        for who, values in now.items():
            counts = self._found[who].counts
            if who in self._before and self._before[who].shape == values.shape and counts.any():
                figures[f"{who}_change"] = (values != self._before[who])[counts].float().mean().item()
        self._before = now
        return figures

    def recorded(self, figures: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in figures.items() if name.endswith(("_entropy", "_max_prob"))}

    def charts(self) -> dict[str, list[str]]:
        return {"entropy": ["monitor/.*_entropy$"], "largest probability": ["monitor/.*_max_prob$"]}
