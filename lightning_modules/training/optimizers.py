"""The optimisers that `module.optimizer` names."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from models.functional.newton_schulz import orthogonalised
from models.interfaces.optimizer import OptimizerName

ROOT_MEAN_SQUARE = 0.2  # of AdamW's steps, in units of the learning rate
ENTRIES_AT_ONCE = 2**24  # of matrices that are orthogonalised together: large ones gain nothing, and would take memory


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
    return CombinedOptimizer(Muon(matrices.values(), lr=lr, weight_decay=weight_decay), adamw)


def used_optimizer(name: OptimizerName, weights: Mapping[str, nn.Parameter]) -> OptimizerName:
    """Whose state a checkpoint of these weights has: without matrices of layers `muon` is AdamW."""
    return "muon" if matrices_for_muon(name, weights) else "adamw"


def matrices_for_muon(name: OptimizerName, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Matrices between hidden states of a layer: no embedding, head, prefix or matrix of low rank. None for `adamw`."""
    if name == "adamw":
        return {}
    return {key: p for key, p in weights.items() if p.ndim == 2 and ".layers." in key and "lora_" not in key}


class Muon(Optimizer):
    """Orthogonalised steps with Nesterov's momentum, of the size that AdamW's have: one rate and one schedule serve both.

    The steps are those of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which takes one matrix after the other and in
    bfloat16 everywhere. Here matrices of one shape go together, and in float32 where bfloat16 saves nothing.
    """

    def __init__(
        self, weights: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no caller has a closure
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, p.device, p.dtype].append(p)
            for weights in alike.values():
                at_once = max(1, ENTRIES_AT_ONCE // weights[0].numel())
                for first in range(0, len(weights), at_once):
                    few = weights[first : first + at_once]
                    self._step(few, group["lr"], group["weight_decay"], group["momentum"])

    def _step(self, weights: list[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> None:
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        means = torch.stack([self.state[p]["momentum_buffer"] for p in weights])
        ahead = torch.stack([p.grad for p in weights]).lerp(means, momentum)
        moves = orthogonalised(ahead.to(torch.bfloat16 if ahead.is_cuda else torch.float32)).to(ahead.dtype)
        for p, move in zip(weights, moves.unbind(), strict=True):
            p.mul_(1 - lr * weight_decay).add_(move, alpha=-lr * ROOT_MEAN_SQUARE * max(p.shape) ** 0.5)


class CombinedOptimizer(Optimizer):
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
            # schedules and checkpoints replace what is here, so each part gets it again
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            part.step()
            first = last
        return loss
