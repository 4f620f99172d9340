"""A published LLaDA checkpoint of a few weights, and a forward written from the published names alone."""

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from models.backbones.llada import LladaModel, build_llada

CONFIG = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_theta": 5000.0,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "d_model": 24,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": None,
    "mlp_ratio": 4,
    "mlp_hidden_size": 40,
    "vocab_size": 50,
    "embedding_size": 56,
    "max_sequence_length": 64,
    "rms_norm_eps": 1e-4,
    "weight_tying": False,
    "mask_token_id": 49,
    "eos_token_id": 48,
    "pad_token_id": 48,
}
IDS = torch.tensor([[3, 49, 7, 49, 11, 2], [48, 0, 49, 9, 9, 30]])


def make_weights(config: dict, prefix: str = "model.transformer.") -> dict[str, torch.Tensor]:
    """Random tensors under the published names; large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    width, ffn, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"] or config["vocab_size"]
    kv_width = (config["n_kv_heads"] or config["n_heads"]) * width // config["n_heads"]
    shapes = {"wte": (rows, width), "ln_f": (width,)}
    if not config["weight_tying"]:
        shapes["ff_out"] = (rows, width)
    for i in range(config["n_layers"]):
        shapes |= {f"blocks.{i}.{norm}": (width,) for norm in ("attn_norm", "ff_norm")}
        shapes |= {f"blocks.{i}.{proj}": (kv_width, width) for proj in ("k_proj", "v_proj")}
        shapes |= {f"blocks.{i}.{proj}": (width, width) for proj in ("q_proj", "attn_out")}
        shapes |= {f"blocks.{i}.{proj}": (ffn, width) for proj in ("ff_proj", "up_proj")}
        shapes |= {f"blocks.{i}.ff_out": (width, ffn)}
    return {
        f"{prefix}{name}.weight": torch.randn(shape, generator=generator)
        * (2 / math.sqrt(shape[-1]) if shape[1:] else 1)
        for name, shape in shapes.items()
    }


def write_official(folder, config=CONFIG, weights=None, shards: int = 1):
    folder.mkdir(parents=True, exist_ok=True)
    weights = make_weights(config) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        part = {name: weights[name] for name in list(weights)[i::shards]}
        save_file(part, folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def reference_logits(config, weights, ids, prefix="model.transformer.", causal=False, interleaved=False):
    """The published architecture in plain torch and float64."""
    w = {name.removeprefix(prefix).removesuffix(".weight"): weight.double() for name, weight in weights.items()}
    heads, kv_heads, length = config["n_heads"], config["n_kv_heads"] or config["n_heads"], ids.shape[1]
    head_width = config["d_model"] // heads

    def norm(x, scale):
        return scale * x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()

    frequency = config["rope_theta"] ** -(torch.arange(0, head_width, 2).double() / head_width)
    angle = torch.arange(length).double()[:, None] * frequency

    def rotate(x):  # (B, H, L, d)
        first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
        return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)

    def split(x, n):
        return x.unflatten(-1, (n, head_width)).transpose(1, 2)

    x = w["wte"][ids]
    for i in range(config["n_layers"]):
        block = {name.removeprefix(f"blocks.{i}."): weight for name, weight in w.items() if f"blocks.{i}." in name}
        h = norm(x, block["attn_norm"])
        q, k = rotate(split(h @ block["q_proj"].T, heads)), rotate(split(h @ block["k_proj"].T, kv_heads))
        k = k.repeat_interleave(heads // kv_heads, dim=1)
        v = split(h @ block["v_proj"].T, kv_heads).repeat_interleave(heads // kv_heads, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(head_width)
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ block["attn_out"].T
        h = norm(x, block["ff_norm"])
        x = x + (F.silu(h @ block["ff_proj"].T) * (h @ block["up_proj"].T)) @ block["ff_out"].T
    return norm(x, w["ln_f"]) @ (w["wte"] if config["weight_tying"] else w["ff_out"]).T


def build_small(build=build_llada, **changes) -> LladaModel:
    options = {
        "vocab_size": 20,
        "mask_token_id": 19,
        "eos_token_id": 18,
        "pad_token_id": 18,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "rope_theta": 10_000.0,
    }
    return build(**options | changes)
