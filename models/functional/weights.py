"""The weights of a module that train, and their running average; whole or split over ranks (DTensor)."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def trainable_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have a gradient, by name; frozen bases are left out."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def number_of_weights(weights: Iterable[Tensor]) -> int:
    """Entries of all tensors together; those of split ones are counted whole."""
    return sum(weight.numel() for weight in weights)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what trains."""
    return {name: p.detach().clone() for name, p in trainable_weights(module).items()}


@torch.no_grad()
def copy_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Overwrite the module's trainable weights with `weights`."""
    for name, p in trainable_weights(module).items():
        p.copy_(distributed_like(weights[name], p))


@torch.no_grad()
def update_average(average: dict[str, Tensor], module: nn.Module, decay: float, steps: int) -> None:
    """Move the average towards what trains, in place.

    The old average has the weight min(decay, (1 + steps) / (10 + steps)) after `steps` steps.
    """
    for name, p in trainable_weights(module).items():
        average[name].lerp_(distributed_like(p.detach(), average[name]), 1 - min(decay, (1 + steps) / (10 + steps)))


def full_tensor(weight: Tensor) -> Tensor:
    """A weight that is split over ranks as a plain tensor, another one as it is; of a split one every rank has to call this."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def distributed_like(weight: Tensor, model: Tensor) -> Tensor:
    """The weight, the same on every rank, whole or split as `model` is."""
    if not isinstance(model, DTensor):
        return full_tensor(weight)
    if isinstance(weight, DTensor):
        return weight
    return distribute_tensor(weight.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def tensor_to_save(weight: Tensor) -> Tensor:
    """A split weight in the host memory of rank 0, which writes, and elsewhere the share; every rank has to call this."""
    if not isinstance(weight, DTensor):
        return weight
    full = full_tensor(weight)
    return full.cpu() if weight.device_mesh.get_rank() == 0 else weight


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """sha256 over every weight's name, shape and up to 1024 evenly spaced values: fast at 8B, and different after training.

    Where weights are split over ranks, every rank has to call it.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        flat = full_tensor(weight.detach()).reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)][:1024].float().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
