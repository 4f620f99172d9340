"""The optimisers that `module.optimizer` names."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

OptimizerName = Literal["adamw", "muon"]


def make_optimizer(
    name: OptimizerName, weights: Mapping[str, nn.Parameter], *, lr: float, weight_decay: float
) -> Optimizer:
    """`adamw`, or `muon` for the matrices of the layers and AdamW for everything else; vectors do not decay."""
    matrices = matrices_for_muon(name, weights)
    others = [p for key, p in weights.items() if key not in matrices]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, lr=lr, betas=(0.9, 0.98))
    if not matrices:
        return adamw
    # with AdamW's size of a step one learning rate and one schedule serve both
    muon = Muon(list(matrices.values()), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return Together(muon, adamw)


def used_optimizer(name: OptimizerName, weights: Mapping[str, nn.Parameter]) -> OptimizerName:
    """Whose state a checkpoint of these weights has: without matrices of layers `muon` is AdamW."""
    return "muon" if matrices_for_muon(name, weights) else "adamw"


def matrices_for_muon(name: OptimizerName, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Matrices between hidden states of a layer: no embedding, head, prefix or matrix of low rank. None for `adamw`."""
    if name == "adamw":
        return {}
    return {key: p for key, p in weights.items() if p.ndim == 2 and ".layers." in key and "lora_" not in key}


class Together(Optimizer):
    """Optimisers of different weights as one: one list of groups, one state, one checkpoint."""

    def __init__(self, *parts: Optimizer) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, {})
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for part in self.parts:
            # schedules and checkpoints replace what is here, so each part is lent it anew
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            part.step()
            first = last
        return loss
