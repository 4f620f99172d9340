"""Words from concepts without an executor in between: a short way for the gradient in training, no part of any answer."""

import torch
from torch import Tensor, nn

from models.plans.unified import UnifiedModel


class BagOfWords(nn.Module):
    """Logits (B, V) of a text's words from its plan's embeddings (B, C, D), each slot with a table of its own."""

    def __init__(self, model: UnifiedModel) -> None:
        super().__init__()
        table = model.backbone.get_input_embeddings().weight
        self.slots = model.layout.slot_columns
        with torch.random.fork_rng(devices=[]):  # what else is drawn does not depend on it
            self.head = nn.Linear(len(self.slots) * table.shape[1], len(table), device=table.device, dtype=table.dtype)

    def forward(self, embeds: Tensor) -> Tensor:
        return self.head(embeds[:, self.slots].flatten(1))
