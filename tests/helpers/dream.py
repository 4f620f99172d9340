"""A published Dream checkpoint of a few weights, and a forward written from the published names alone."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

CONFIG = {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "attention_dropout": 0.0,
    "bos_token_id": 257,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "mask_token_id": 261,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "max_window_layers": 3,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-4,
    "rope_scaling": None,
    "rope_theta": 5000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 270,
}
GENERATION = {
    "_from_model_config": True,
    "alg": "origin",
    "alg_temp": None,
    "bos_token_id": 257,
    "eos_token_id": 257,
    "eps": 0.001,
    "mask_token_id": None,
    "output_history": False,
    "pad_token_id": 257,
    "steps": 512,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]  # ids from 257 on
WORDS = 262  # ids of the tokenizer


def make_weights(config: dict) -> dict[str, torch.Tensor]:
    """Random tensors under the published names; large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    width, ffn, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_width = config["num_key_value_heads"] * width // config["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (rows, width)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, out in (("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width)):
            shapes |= {f"{layer}.self_attn.{name}.weight": (out, width), f"{layer}.self_attn.{name}.bias": (out,)}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, width)
        shapes |= {f"{layer}.mlp.{name}.weight": (ffn, width) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, ffn)
    return {
        name: torch.randn(shape, generator=generator) * (1.5 / math.sqrt(shape[-1]) if shape[1:] else 1)
        for name, shape in shapes.items()
    }


def reference_logits(
    config: dict, weights: dict[str, torch.Tensor], ids: torch.Tensor, seen: torch.Tensor, *, causal: bool = False
) -> torch.Tensor:
    """(B, L, V) in float64 of the original's `forward` at each position, before its logits are shifted."""
    w = {name: weight.double() for name, weight in weights.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config["hidden_size"] // heads
    position = (seen.long().cumsum(-1) - 1).masked_fill(~seen, 1).double()
    frequency = config["rope_theta"] ** (-torch.arange(0, head, 2).double() / head)
    angle = (position.unsqueeze(-1) * frequency).repeat(1, 1, 2).unsqueeze(1)
    visible = seen[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    if causal:
        visible = visible.tril()

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * w[f"{name}.weight"]

    def split(x, name, count):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"]).unflatten(-1, (count, head)).transpose(1, 2)

    def rotate(x):
        one, two = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-two, one], -1) * angle.sin()

    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm")
        q = rotate(split(y, f"{layer}.self_attn.q_proj", heads))
        k, v = (split(y, f"{layer}.self_attn.{name}", kv_heads) for name in ("k_proj", "v_proj"))
        k, v = (z.repeat_interleave(heads // kv_heads, 1) for z in (rotate(k), v))
        scores = (q @ k.mT / math.sqrt(head)).masked_fill(~visible, torch.finfo(torch.float64).min)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ w[f"{layer}.self_attn.o_proj.weight"].mT
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate, up, down = (w[f"{layer}.mlp.{name}.weight"].mT for name in ("gate_proj", "up_proj", "down_proj"))
        x = x + (F.silu(y @ gate) * (y @ up)) @ down
    head_weight = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, "model.norm") @ head_weight.mT


def write_dream(
    folder: Path, config: dict = CONFIG, weights: dict | None = None, *, tokenizer: bool = True, mask: int = 261
) -> Path:
    """A folder as it is published, with a tokenizer that names code; mask: the id of the tokenizer's mask."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    save_file(make_weights(config) if weights is None else weights, folder / "model.safetensors")
    if tokenizer:
        names = SPECIAL[: mask - 257] + SPECIAL[-1:] if mask < 261 else SPECIAL
        _write_tokenizer(folder, names)
    return folder


def _write_tokenizer(folder: Path, special: list[str]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate([*alphabet, "he"])}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    how = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    described = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(257 + k): {"content": token, **how} for k, token in enumerate(special)},
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "errors": "replace",
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
