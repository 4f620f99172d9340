"""The texts of the last batches: more draws of the same law, for targets that are averaged over texts (`text_posterior`)."""

from typing import Any

import torch
from torch import Tensor


class RecentTexts:
    """size: texts that are kept, a batch at least."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ids: Tensor | None = None

    def add(self, batch: Tensor) -> Tensor:
        """Ids (B, L) of a batch -> (N, L): the batch first, then the newest of those before, no more than `size` in all."""
        before = self.ids
        if before is None or before.shape[1:] != batch.shape[1:]:
            before = batch[:0]
        self.ids = torch.cat([batch, before.to(batch.device)])[: max(self.size, len(batch))]
        return self.ids

    def state_dict(self) -> dict[str, Any]:
        return {"ids": None if self.ids is None else self.ids.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ids = state["ids"]
