"""Monitor 5: how sure the planner is. High at first, then sharp, then stable; one that is sharp at once has collapsed."""

from typing import Any

import torch
from torch import Generator, Tensor

from callbacks.monitors.rows import CHUNK, RowMonitor
from models.functional.certainty import certainty
from models.interfaces.probe_batch import Choices, rows_at
from models.interfaces.probes import ChoiceProbe


class SharpnessMonitor(RowMonitor):
    """<who>_entropy (nats a choice), <who>_max_prob, <who>_entropy_share and <who>_usage: see `certainty`."""

    offers = ChoiceProbe

    def measure(self, probe: Any, rows: dict[str, Tensor], generator: Generator) -> dict[str, float]:
        parts = range(0, len(rows["input_ids"]), CHUNK)
        found = [probe.choices(rows_at(rows, slice(at, at + CHUNK)), generator) for at in parts]
        figures = {}
        for who in found[0]:
            whole = Choices(*(torch.cat(columns) for columns in zip(*(part[who] for part in found), strict=True)))
            figures |= {f"{who}_{name}": value for name, value in certainty(*whole).items()}
        return figures

    def recorded(self, figures: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in figures.items() if name.endswith(("_entropy", "_max_prob"))}

    def charts(self) -> dict[str, list[str]]:
        return {"entropy": ["monitor/.*_entropy$"], "largest probability": ["monitor/.*_max_prob$"]}
