"""Small causal language models made on the spot."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def tiny_qwen(seed: int, vocabulary: int = 50, scale: float = 3.0, dtype=torch.float32, **options) -> Qwen3ForCausalLM:
    """Random weights, made larger so that its distributions are far from uniform."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    special = {"eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 1}
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **(sizes | heads | special | options))).eval().to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight *= scale
    return model
