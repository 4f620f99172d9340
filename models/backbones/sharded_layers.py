"""Frozen linear layers of which every rank keeps a share, and gathers the whole where it is used.

A share is a DTensor, rows of the weight split over the ranks. `FrozenLinear` gathers it for a product, in the forward pass, in
its forward-mode derivative and again in the backward pass, and keeps nothing of the whole between them. Every rank therefore
has to take the same products in the same order. It is done by the product and not by hooks on modules, so that copies with
shared weights, other weights by `functional_call` and dual numbers work as on one rank.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from models.backbones.frozen_layers import FrozenLinear
from models.functional.weights import full_tensor


def shard_frozen(module: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Split the weight of every frozen linear layer over the ranks of a 1D mesh, in place.

    Layers that share a weight go on sharing it. A weight that is also an embedding table stays whole.
    """
    tables = {id(table.weight) for table in module.modules() if isinstance(table, nn.Embedding)}
    split: dict[int, nn.Parameter] = {}
    for layer in frozen_linears(module):
        own = layer.weight
        if id(own) in tables or isinstance(own, DTensor):
            continue
        if id(own) not in split:
            # every rank has read the same weights, so nothing has to be sent
            share = distribute_tensor(own.detach().to(device), mesh, [Shard(0)], src_data_rank=None)
            split[id(own)] = nn.Parameter(share, requires_grad=False)
        layer.__class__ = FrozenLinear
        layer.weight = split[id(own)]


def frozen_linears(module: nn.Module) -> Iterator[nn.Linear]:
    """Plain linear layers whose weight does not train."""
    for layer in module.modules():
        if type(layer) in (nn.Linear, FrozenLinear) and not layer.weight.requires_grad:
            yield layer


@torch.no_grad()
def gather_frozen(module: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    """Give every such layer its whole weight; what `scatter_frozen` needs to take it back. Every rank has to call this."""
    shares, found = [], {}
    for layer in frozen_linears(module):
        own = layer.weight
        if isinstance(own, DTensor):
            if id(own) not in found:
                found[id(own)] = nn.Parameter(full_tensor(own), requires_grad=False)
            shares.append((layer, own))
            layer.weight = found[id(own)]
    return shares


def scatter_frozen(shares: list[tuple[nn.Module, nn.Parameter]]) -> None:
    """Give layers their shares back."""
    for layer, share in shares:
        layer.weight = share
