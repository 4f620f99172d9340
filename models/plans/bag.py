"""Tokens predicted from concepts without an executor: a short path for the gradient in training, not used to generate."""

import torch
from torch import Tensor, nn

from models.backbones.added_layers import added_like
from models.plans.unified import UnifiedModel


class BagOfWords(nn.Module):
    """Logits (B, V) of a text's tokens from its plan's embeddings (B, C, D), one linear layer over all slots."""

    def __init__(self, model: UnifiedModel) -> None:
        super().__init__()
        table = model.backbone.get_input_embeddings().weight
        self.slots = model.layout.slot_columns
        with torch.random.fork_rng(devices=[]):  # other draws of the run do not depend on this layer
            self.head = nn.Linear(len(self.slots) * table.shape[1], len(table), **added_like(table))

    def forward(self, embeds: Tensor) -> Tensor:
        return self.head(embeds[:, self.slots].flatten(1))
