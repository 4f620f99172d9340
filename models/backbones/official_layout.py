"""The published LLaDA layout in terms of ours: what its config fields and its tensor names become.

Pure functions; nothing here opens a file or builds a model. Source: configuration_llada.py and modeling_llada.py beside
the published weights (GSAI-ML/LLaDA-8B-Base, -Instruct). A field that config.json leaves out takes the original code's
default, which is often not the 8B model's value.
"""

import re
from functools import partial
from typing import Any

from models.backbones.config_fields import positive, require_computed, row_of_table
from models.functional.errors import UsageError

LLADA_VOCAB_SIZE, LLADA_MASK_ID = 126464, 126336

# field: (the original's default, the values that a Llama-shaped body without biases computes exactly)
_EXPRESSIBLE: dict[str, tuple[Any, list[Any]]] = {
    "block_type": ("sequential", ["llama"]),
    "activation_type": ("swiglu", ["silu"]),
    "layer_norm_type": ("default", ["rms"]),
    "layer_norm_with_affine": (True, [True]),
    "bias_for_layer_norm": (None, [False, None]),
    "attention_layer_norm": (False, [False]),
    "include_bias": (False, [False]),
    "include_qkv_bias": (False, [False, None]),
    "rope": (False, [True]),
    "alibi": (False, [False]),
    "scale_logits": (False, [False]),
    "input_emb_norm": (False, [False]),
    "block_group_size": (1, [1]),
    "multi_query_attention": (None, [None, False]),
    "quantization_config": (None, [None]),
}

_OUTER = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_OUTER_BACK = {ours: official for official, ours in _OUTER.items()}
_BLOCK_BACK = {ours: official for official, ours in _BLOCK.items()}
_OFFICIAL_NAME = re.compile(r"(?:model\.)?transformer\.(?:blocks\.(0|[1-9]\d*)\.)?(\w+)\.weight")
_LEAP_NAME = re.compile(r"(?:model\.layers\.(0|[1-9]\d*)\.)?(.+)\.weight")


def official_to_leap_key(name: str) -> str | None:
    """`model.transformer.blocks.3.ff_proj.weight` -> `model.layers.3.mlp.gate_proj.weight`; None for an unknown name.

    The prefix may also be `transformer.` alone.
    """
    match = _OFFICIAL_NAME.fullmatch(name)
    if match is None:
        return None
    layer, part = match.groups()
    own = _OUTER.get(part) if layer is None else _BLOCK.get(part)
    if own is None:
        return None
    return f"{own}.weight" if layer is None else f"model.layers.{layer}.{own}.weight"


def leap_to_official_key(name: str) -> str | None:
    """The inverse of `official_to_leap_key`, with the prefix `model.transformer.`; None for an unknown name."""
    match = _LEAP_NAME.fullmatch(name)
    if match is None:
        return None
    layer, own = match.groups()
    part = _OUTER_BACK.get(own) if layer is None else _BLOCK_BACK.get(own)
    if part is None:
        return None
    return f"model.transformer.{part}.weight" if layer is None else f"model.transformer.blocks.{layer}.{part}.weight"


def is_official_config(config: dict) -> bool:
    """Whether these are the original's field names (d_model, n_layers, n_heads), not ours (hidden_size, ...)."""
    return {"d_model", "n_layers", "n_heads"} <= config.keys() and config.get("model_type", "llada") == "llada"


def config_from_official(config: dict) -> dict:
    """The original's fields -> keyword arguments of `LladaConfig`.

    `embedding_size` (null = `vocab_size`) may exceed `vocab_size`: the table and the head have that many rows, so it
    becomes our `vocab_size`. Dropout rates are not carried over: this body has no dropout.
    Errors: UsageError that names the field: missing, impossible, or more than this body can express.
    """
    require_computed(config, "LLaDA", _EXPRESSIBLE, "GSAI-ML/LLaDA-8B-Instruct")
    positive_of = partial(positive, "LLaDA", config)
    width, layers, heads = (positive_of(field) for field in ("d_model", "n_layers", "n_heads"))
    kv_heads = heads if config.get("n_kv_heads") is None else positive_of("n_kv_heads")
    if width % heads or (width // heads) % 2:
        raise UsageError(f"the LLaDA config's d_model {width} does not give n_heads {heads} an even width each")
    if heads % kv_heads:
        raise UsageError(f"the LLaDA config's n_heads {heads} is not a multiple of n_kv_heads {kv_heads}")
    if config.get("mlp_hidden_size") is None:
        ffn_width = positive_of("mlp_ratio", default=4) * width
    else:
        ffn_width = positive_of("mlp_hidden_size")
    vocab_size = positive_of("vocab_size")
    rows = vocab_size if config.get("embedding_size") is None else positive_of("embedding_size")
    if rows < vocab_size:
        raise UsageError(f"the LLaDA config's embedding_size {rows} is smaller than its vocab_size {vocab_size}")
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": ffn_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positive_of("max_sequence_length", default=1024),
        "rope_parameters": {"rope_type": "default", "rope_theta": positive_of("rope_theta", float, 10_000.0)},
        "rms_norm_eps": positive_of("rms_norm_eps", float, 1e-5),
        "tie_word_embeddings": config.get("weight_tying", True),
        "mask_token_id": _mask_id(config, vocab_size, rows),
        "bos_token_id": None,
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
    }


def _mask_id(config: dict, vocab_size: int, rows: int) -> int:
    value = config.get("mask_token_id")
    if value is None and vocab_size == LLADA_VOCAB_SIZE:
        return LLADA_MASK_ID
    if value is None:
        raise UsageError(
            f"the LLaDA config has no mask_token_id, and with a vocabulary of {vocab_size} it cannot be guessed; "
            'add "mask_token_id": ID to config.json, with the id of the tokenizer\'s mask token'
        )
    return row_of_table("LLaDA", "mask_token_id", value, rows)
