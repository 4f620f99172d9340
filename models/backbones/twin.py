"""A second network on the very same weights, so that an adapted one and its frozen teacher are one copy in memory."""

from typing import TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

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
