"""The best plan found so far of every training row, the same on all ranks, and when it is worth looking again.

Legend: N training rows, B rows of a batch, S slots.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.functional.plan_search import next_interval

NEVER = -1


@dataclass
class Refresh:
    """A plan is searched again after `interval` steps: fewer where plans were stale by more than `tolerance` nats.

    enough: rows searched again (or all, if fewer) without which nothing is said of the mean staleness: it differs much from
    row to row.
    """

    interval: int = 500
    tolerance: float = 0.5
    enough: int = 256
    least: int = 50
    most: int = 5000


class PlanCache:
    """Dense tensors by row number, on the CPU: choices (N, S), scores (N,) nats, and the step (N,) at which they were found.

    It knows nothing of ranks or batches. A run that goes on with another number of either reads the same cache.
    """

    def __init__(self, rows: int, slots: int, refresh: Refresh) -> None:
        self.choices = torch.zeros(rows, slots, dtype=torch.int16)
        self.scores = torch.full((rows,), -torch.inf)
        self.found = torch.full((rows,), NEVER)
        self.refresh, self.interval = refresh, refresh.interval
        # staleness since the step of the last change: sum and number
        self.gaps, self.adapted = torch.zeros(2, dtype=torch.float64), 0

    def known(self, rows: Tensor) -> Tensor:
        """(B,) bool: rows (B,) that have a plan."""
        return self.found[rows.cpu()].ne(NEVER).to(rows.device)

    def due(self, rows: Tensor, step: int) -> Tensor:
        """(B,) bool: rows without a plan, or whose plan is older than the interval."""
        found = self.found[rows.cpu()]
        return ((found == NEVER) | (step - found >= self.interval)).to(rows.device)

    def get(self, rows: Tensor) -> Tensor:
        """Choices (B, S) of rows (B,)."""
        return self.choices[rows.cpu()].long().to(rows.device)

    def put(self, rows: Tensor, choices: Tensor, scores: Tensor, step: int) -> None:
        rows = rows.cpu()
        self.choices[rows] = choices.to("cpu", self.choices.dtype)
        self.scores[rows] = scores.to("cpu", self.scores.dtype)
        self.found[rows] = step

    def adapt(self, gaps: Tensor, step: int) -> None:
        """Once an interval, set the next by the mean staleness (B,) of plans that were searched again since, NaN for others.

        It waits until these are `enough`.
        """
        again = gaps[~gaps.isnan()].double()
        self.gaps += torch.tensor([again.sum(), len(again)], dtype=torch.float64)
        total, count = self.gaps.tolist()
        r = self.refresh
        if count >= min(r.enough, len(self.found)) and step - self.adapted >= self.interval:
            self.interval = next_interval(self.interval, total / count, r.tolerance, r.least, r.most)
            self.gaps, self.adapted = torch.zeros(2, dtype=torch.float64), step

    def state_dict(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in ("choices", "scores", "found", "gaps")}
        return tensors | {"interval": self.interval, "adapted": self.adapted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.choices, self.scores, self.found, self.gaps = (
            state[name].clone() for name in ("choices", "scores", "found", "gaps")
        )
        self.interval, self.adapted = int(state["interval"]), int(state["adapted"])
