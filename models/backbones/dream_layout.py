"""The published Dream layout in terms of Qwen2, whose layers and tensor names it has.

Pure functions; nothing here opens a file or builds a model. Source: configuration_dream.py and modeling_dream.py beside the
published weights (Dream-org/Dream-v0-Base-7B, -Instruct-7B; Ye et al., 2508.15487). Every position sees every other one, and
the state before a position predicts its token. A field that config.json leaves out takes the original code's default.
"""

import json
from functools import partial
from typing import Any

from models.backbones.config_fields import positive, require_computed
from models.functional.errors import UsageError

DREAM = "Dream"
EXAMPLE = "Dream-org/Dream-v0-Instruct-7B"
DREAM_MASK_ID, DREAM_PAD_ID = 151666, 151643

# field: (the original's default, the values that Qwen2's layers compute exactly)
_EXPRESSIBLE: dict[str, tuple[Any, list[Any]]] = {
    # DreamForCausalLM is another network of the same type: of blocks, and its logits are not shifted
    "architectures": (["DreamModel"], [["DreamModel"]]),
    "block_size": (None, [None]),
    "hidden_act": ("silu", ["silu"]),
    "rope_scaling": (None, [None]),
    "use_sliding_window": (False, [False]),
    "quantization_config": (None, [None]),
}


def is_dream_config(config: dict) -> bool:
    return config.get("model_type") == DREAM


def config_from_dream(config: dict) -> dict:
    """The original's fields -> keyword arguments of `Qwen2Config`.

    Queries, keys and values have biases whatever `attention_bias` says, as in the original. Dropout rates are not carried over.
    Errors: UsageError that names the field: impossible, or more than Qwen2's layers express.
    """
    require_computed(config, DREAM, _EXPRESSIBLE, EXAMPLE)
    positive_of = partial(positive, DREAM, config)
    width, heads = positive_of("hidden_size", default=4096), positive_of("num_attention_heads", default=32)
    kv_heads = positive_of("num_key_value_heads", default=32) if config.get("num_key_value_heads", 32) else heads
    if width % heads or (width // heads) % 2:
        raise UsageError(
            f"the Dream config's hidden_size {width} does not give num_attention_heads {heads} an even width each"
        )
    if heads % kv_heads:
        raise UsageError(
            f"the Dream config's num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return {
        "vocab_size": positive_of("vocab_size", default=151936),
        "hidden_size": width,
        "intermediate_size": positive_of("intermediate_size", default=22016),
        "num_hidden_layers": positive_of("num_hidden_layers", default=32),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positive_of("max_position_embeddings", default=32768),
        "rope_parameters": {"rope_type": "default", "rope_theta": _rope_theta(config)},
        "rms_norm_eps": positive_of("rms_norm_eps", float, 1e-6),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id", DREAM_PAD_ID),
    }


def dream_mask_id(config: dict) -> int:
    """The id of the mask token. Errors: UsageError where it is no row of the table."""
    value, rows = config.get("mask_token_id", DREAM_MASK_ID), positive(DREAM, config, "vocab_size", default=151936)
    if not isinstance(value, int) or not 0 <= value < rows:
        raise UsageError(
            f"the Dream config's mask_token_id {json.dumps(value)} is not one of the {rows} rows of its table"
        )
    return value


def _rope_theta(config: dict) -> float:
    """Of the original's own field, or of `rope_parameters`, which newer versions of transformers write instead."""
    rope = {"rope_theta": config.get("rope_theta", 10_000.0), **(config.get("rope_parameters") or {})}
    require_computed(rope, DREAM, {"rope_type": ("default", ["default"])}, EXAMPLE)
    return positive(DREAM, rope, "rope_theta", float)
