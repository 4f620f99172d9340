"""Layers that a method adds to a pretrained model.

A step of AdamW moves a weight by about the learning rate. A bfloat16 weight w does not move by less than about w / 256, so that
added weights stay float32 where the model itself is kept in 16 bits.
"""

from typing import Any

import torch
from torch import Tensor, nn


def added_like(table: Tensor) -> dict[str, Any]:
    """Device and number type of weights that are added to a model with this embedding table: at least float32."""
    return {"device": table.device, "dtype": torch.promote_types(table.dtype, torch.float32)}


class AddedLinear(nn.Linear):
    """Multiplies in the type of its weights; the result has the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
