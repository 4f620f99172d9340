"""A second LLaDA on the very same weights, so that an adapted network and its frozen teacher are one copy in memory."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from models.backbones.frozen_layers import freeze
from models.backbones.llada import LladaModel

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def share_weights(base: LladaModel) -> LladaModel:
    """A model with modules of its own and the base's Parameter objects: no weight is copied, and training one trains both."""
    with torch.device("meta"):
        twin = type(base)(base.config)
    theirs = dict(base.named_modules())
    for name, module in twin.named_modules():
        for key in module._parameters:
            module._parameters[key] = theirs[name]._parameters[key]
    twin.model.rotary_emb = base.model.rotary_emb
    return twin.eval()


def with_lora(base: LladaModel, rank: int) -> LladaModel:
    """A copy on the same weights with LoRA (Hu et al., 2021) on every linear layer of the body; adapters start as no-ops."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(LORA_TARGETS))
    return inject_adapter_in_model(config, freeze(share_weights(base)))


def with_own_weights(base: LladaModel) -> LladaModel:
    """A copy whose layers, last norm and head are trainable copies; the embedding table is the base's, frozen."""
    twin = share_weights(base)
    kept = {id(base.model.embed_tokens.weight)}
    for module in twin.modules():
        for key, weight in module._parameters.items():
            if weight is not None and id(weight) not in kept:
                module._parameters[key] = nn.Parameter(weight.detach().clone())
    return twin
