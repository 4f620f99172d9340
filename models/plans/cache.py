"""The best plan found so far of every training row, the same on all ranks, and when to search again.

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
    """A plan is searched again after `interval` steps; the interval shrinks where staleness is above `tolerance` nats.

    enough: rows searched again (or all, if fewer) before the mean staleness counts, because it varies much between rows.
    least, most: limits of the interval.
    """

    interval: int = 250
    tolerance: float = 0.5
    enough: int = 256
    least: int = 50
    most: int = 5000


class PlanCache:
    """Dense tensors by row number, on the CPU: choices (N, S), scores (N,) nats, and the step (N,) at which they were found.

    Its content does not depend on ranks or batches. A run resumed with another number of ranks reads the same cache.
    """

    def __init__(self, rows: int, slots: int, refresh: Refresh) -> None:
        self.choices = torch.zeros(rows, slots, dtype=torch.int32)
        self.scores = torch.full((rows,), -torch.inf)
        self.found = torch.full((rows,), NEVER)
        self.refresh, self.interval = refresh, refresh.interval
        # staleness since the step of the last change: sum and number
        self.gaps, self.adapted = torch.zeros(2, dtype=torch.float64), 0

    def known(self, rows: Tensor) -> Tensor:
        """Which of the rows (B,) have a plan, (B,) bool."""
        return self.found[rows.cpu()].ne(NEVER).to(rows.device)

    def due(self, rows: Tensor, step: int) -> Tensor:
        """Which of the rows (B,) have no plan, or one that is at least `interval` steps old, (B,) bool."""
        found = self.found[rows.cpu()]
        return ((found == NEVER) | (step - found >= self.interval)).to(rows.device)

    def get(self, rows: Tensor) -> Tensor:
        """The plans (B, S) of rows (B,)."""
        return self.choices[rows.cpu()].long().to(rows.device)

    def put(self, rows: Tensor, choices: Tensor, scores: Tensor, step: int) -> None:
        rows = rows.cpu()
        self.choices[rows] = choices.to("cpu", self.choices.dtype)
        self.scores[rows] = scores.to("cpu", self.scores.dtype)
        self.found[rows] = step

    def adapt(self, gaps: Tensor, step: int) -> None:
        """Adapt the interval, at most once an interval, to the mean staleness of plans that were searched again since.

        gaps (B,): staleness in nats, NaN for rows that were not searched again. Nothing changes before there are `enough`.
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
        self.choices = self.choices.int()  # older checkpoints hold 16 bits
        self.interval, self.adapted = int(state["interval"]), int(state["adapted"])
