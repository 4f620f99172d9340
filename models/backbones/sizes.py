"""Sizes of a network that fit together, checked before anything is built."""

from typing import Any

from models.functional.errors import UsageError

IDS = ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")

# a network just large enough to try a module's options on
STAND_IN: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
    "rope_theta": 10_000.0,
}


def require_fitting_sizes(options: dict[str, Any]) -> None:
    """Raise UsageError, naming model.<option>, where ids lie outside the vocabulary or widths and heads do not fit.

    options: `vocab_size`, the ids (None for a token that the vocabulary lacks), `hidden_size`, `num_attention_heads`,
    `num_key_value_heads` (already resolved) and any other numbers, which have to be above 0.
    """
    vocab_size, heads, kv_heads = (
        options[name] for name in ("vocab_size", "num_attention_heads", "num_key_value_heads")
    )
    for name, value in options.items():
        if name in IDS and value is None:
            continue
        if name in IDS and not 0 <= value < vocab_size:
            raise UsageError(f"model.{name}={value} is outside the vocabulary; type an id from 0 to {vocab_size - 1}")
        if name not in IDS and name != "tie_word_embeddings" and value <= 0:
            raise UsageError(f"model.{name}={value} has to be above 0")
    mask = options["mask_token_id"]
    if mask is not None and mask in (options["eos_token_id"], options["pad_token_id"]):
        raise UsageError(f"model.mask_token_id={mask} is also the end or padding token; give the mask its own id")
    step, width = 2 * heads, options["hidden_size"]  # rotary positions turn pairs of numbers
    if width % step:
        raise UsageError(
            f"model.hidden_size={width} does not give each of model.num_attention_heads={heads} "
            f"an even width; type a multiple of {step}, such as model.hidden_size={-(-width // step) * step}"
        )
    if heads % kv_heads:
        raise UsageError(
            f"model.num_key_value_heads={kv_heads} does not divide model.num_attention_heads="
            f"{heads}; type model.num_key_value_heads={heads} for one each"
        )
