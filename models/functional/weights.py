"""The weights of a module that train, and their running average."""

import torch
from torch import Tensor, nn


def trainable_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have a gradient, by name; frozen bases are left out."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what trains."""
    return {name: p.detach().clone() for name, p in trainable_weights(module).items()}


@torch.no_grad()
def copy_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put `weights`, one for each that trains, in the place of the module's own."""
    for name, p in trainable_weights(module).items():
        p.copy_(weights[name])


@torch.no_grad()
def update_average(average: dict[str, Tensor], module: nn.Module, decay: float, steps: int) -> None:
    """Move the average towards what trains, in place.

    The past weighs min(decay, (1 + steps) / (10 + steps)) after `steps` steps: little at first, when it is worth little.
    """
    for name, p in trainable_weights(module).items():
        average[name].lerp_(p.detach(), 1 - min(decay, (1 + steps) / (10 + steps)))
