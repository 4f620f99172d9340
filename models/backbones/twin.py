"""A second network on the very same weights, so that an adapted one and its frozen teacher are one copy in memory."""

from typing import TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from models.backbones.causal_lm import with_adapters
from models.backbones.frozen_layers import freeze
from models.backbones.llada import LladaModel
from models.backbones.masked_from_causal import MaskedFromCausal

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Network = TypeVar("Network", LladaModel, MaskedFromCausal)


def share_weights(base: Network) -> Network:
    """A model with modules of its own and the base's Parameter objects: no weight is copied, and training one trains both."""
    with torch.device("meta"):
        twin = (
            MaskedFromCausal(type(base.causal)(base.causal.config), base.options)
            if isinstance(base, MaskedFromCausal)
            else type(base)(base.config)
        )
    theirs = dict(base.named_modules())
    for name, module in list(twin.named_modules()):
        for key in module._parameters:
            module._parameters[key] = theirs[name]._parameters[key]
        for key, child in module._modules.items():
            if list(child.buffers()) and not list(child.parameters()):  # rotary angles
                module._modules[key] = theirs[name]._modules[key]
        for key in module._buffers:
            module._buffers[key] = theirs[name]._buffers[key]
    if isinstance(base, MaskedFromCausal):
        twin.usual_attention = base.usual_attention
    return twin.eval()


def with_lora(base: Network, rank: int) -> Network:
    """A copy on the same weights with LoRA (Hu et al., 2021) on every linear layer of the body; adapters start as no-ops."""
    twin = freeze(share_weights(base))
    if isinstance(twin, MaskedFromCausal):
        with_adapters(twin.causal, rank)  # puts them into the layers
        return twin
    targets = getattr(twin, "lora_targets", list(LORA_TARGETS))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    return inject_adapter_in_model(config, twin)


class LoraXsLinear(nn.Module):
    """LoRA-XS (arXiv 2405.17604): y = W x + U_r Σ_r R V_rᵀ x, where U Σ Vᵀ = W; R (rank, rank) alone trains.

    R = 0 changes nothing. A layer of fewer inputs or outputs than `rank` has that rank. U, Σ and V follow from W, and no file
    holds them. So they are computed in float64, with signs by a rule, to be the same on every machine. At 8B that takes long.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, rank = base, min(rank, *base.weight.shape)
        self.core = nn.Parameter(base.weight.new_zeros(rank, rank, dtype=torch.float32))
        u, s, vh = torch.linalg.svd(base.weight.detach().double(), full_matrices=False)
        sign = vh.gather(-1, vh.abs().argmax(-1, keepdim=True)).sign()[:rank]  # of a vector's largest entry
        self.register_buffer("up", (u[:, :rank] * s[:rank] * sign.T).float(), persistent=False)
        self.register_buffer("down", (vh[:rank] * sign).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        change = (x.to(self.core.dtype) @ self.down.T) @ self.core.T @ self.up.T
        return self.base(x) + change.to(x.dtype)


def with_lora_xs(base: LladaModel, rank: int) -> LladaModel:
    """A copy on the same weights with LoRA-XS on every linear layer of the body; adapters start as no-ops."""
    twin = freeze(share_weights(base))
    layers = [
        (module, name) for module in twin.modules() for name, _ in module.named_children() if name in LORA_TARGETS
    ]
    for module, name in layers:
        setattr(module, name, LoraXsLinear(getattr(module, name), rank))
    return twin


def with_own_weights(base: Network) -> Network:
    """A copy whose layers, last norm and head are trainable copies; the embeddings, the mask's too, are the base's, frozen."""
    twin = share_weights(base)
    causal = isinstance(base, MaskedFromCausal)
    kept = {id(base.causal.get_input_embeddings().weight), id(base.mask_change)} if causal else {id(base.embedding)}
    for module in twin.modules():
        for key, weight in module._parameters.items():
            if weight is not None and id(weight) not in kept:
                module._parameters[key] = nn.Parameter(weight.detach().clone())
    return twin
