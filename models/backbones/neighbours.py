"""Llama-shaped networks whose heads start out looking at neighbours; see `models.functional.neighbour_heads`."""

import torch
from torch import nn

from models.functional.errors import UsageError
from models.functional.neighbour_heads import neighbour_biases, offset_of_head


def require_neighbour_heads(heads: int, key_value_heads: int) -> None:
    """Errors: UsageError that names model.neighbour_heads."""
    if not 0 <= heads <= key_value_heads:
        raise UsageError(
            f"model.neighbour_heads={heads} must lie between 0 and the {key_value_heads} key-value heads of a layer"
        )


@torch.no_grad()
def turn_to_neighbours(model: nn.Module, heads: int) -> None:
    """Give the first `heads` key-value heads of each layer, and the queries that they answer, the biases of a neighbour."""
    config, frequencies = model.config, model.model.rotary_emb.inv_freq
    groups = config.num_attention_heads // config.num_key_value_heads
    width = 2 * len(frequencies)
    for layer in model.model.layers:
        for head in range(heads):
            query, key = neighbour_biases(frequencies, offset_of_head(head))
            layer.self_attn.q_proj.bias.view(-1, groups, width)[head] = query
            layer.self_attn.k_proj.bias.view(-1, width)[head] = key
