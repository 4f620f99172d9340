"""Tensors of all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Columns (N, ...) of all ranks, concatenated in the order of ranks; every rank has to call this."""
    if not is_distributed():
        return columns
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, columns)
    return {name: torch.cat([part[name] for part in every]) for name in columns}


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks; every rank has to call this."""
    total = values.clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def rank_mean(value: Tensor) -> Tensor:
    """The mean over all ranks; every rank has to call this."""
    return summed(value) / (dist.get_world_size() if is_distributed() else 1)


def is_rank_zero() -> bool:
    return not is_distributed() or dist.get_rank() == 0


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
