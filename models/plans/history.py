"""The most probable plans of validation texts at the previous validation, the same on all ranks.

Legend: N validation rows, B rows of a batch, S slots.
"""

import torch
from torch import Tensor

from models.functional.ranks import gathered

NONE = -1


class PlanHistory:
    """choices (N, S) by row number, on the CPU; None before the first validation has ended."""

    def __init__(self) -> None:
        self.choices: Tensor | None = None
        self._now: list[tuple[Tensor, Tensor]] = []

    def previous(self, rows: Tensor) -> Tensor | None:
        """The earlier plans (B, S) of rows (B,), None unless all have one."""
        own = rows.cpu()
        if self.choices is None or own.max() >= len(self.choices):
            return None
        found = self.choices[own]
        return None if (found == NONE).any() else found.to(rows.device)

    def add(self, rows: Tensor, choices: Tensor) -> None:
        """Plans (B, S) of rows (B,), found in this validation."""
        self._now.append((rows.cpu(), choices.cpu()))

    def close(self, slots: int) -> None:
        """End a validation of plans with so many slots: what it found becomes the previous plans. Every rank calls it."""
        rows, choices = zip((torch.zeros(0).long(), torch.zeros(0, slots).long()), *self._now, strict=True)
        found = gathered({"rows": torch.cat(rows), "choices": torch.cat(choices)})
        self._now = []
        if len(found["rows"]):
            self.choices = torch.full((int(found["rows"].max()) + 1, slots), NONE)
            self.choices[found["rows"]] = found["choices"]
