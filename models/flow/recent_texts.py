"""The texts of the last batches: more draws of the same distribution, for targets averaged over texts (`text_posterior`)."""

from typing import Any

import torch
from torch import Tensor


class RecentTexts:
    """size: texts in memory, at least a batch. They are of one epoch, so that no text is in memory twice."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ids: Tensor | None = None
        self.epoch = 0

    def add(self, batch: Tensor, epoch: int) -> Tensor:
        """Ids (B, L) of a batch -> (N, L): the batch first, then the newest before it in this epoch; no more than `size`."""
        before = self.ids
        if before is None or epoch != self.epoch or before.shape[1:] != batch.shape[1:]:
            before = batch[:0]
        self.epoch = epoch
        self.ids = torch.cat([batch, before.to(batch.device)])[: max(self.size, len(batch))]
        return self.ids

    def state_dict(self) -> dict[str, Any]:
        return {"ids": None if self.ids is None else self.ids.cpu(), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ids, self.epoch = state["ids"], state["epoch"]
