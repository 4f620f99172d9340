"""The layout of MDLM's and Duo's published models: what config.json, or a training's configuration, has to say.

Pure functions; nothing here opens a file or builds a model. Sources: configuration_mdlm.py beside kuleshov-group/mdlm-owt, and
the configurations of github.com/kuleshov-group/mdlm (2406.07524) and github.com/s-sahoo/duo (2506.10892).
"""

from functools import partial
from typing import Any

from models.backbones.config_fields import positive, require_computed, row_of_table
from models.functional.errors import UsageError

MDLM = "mdlm"
EXAMPLE = "kuleshov-group/mdlm-owt"
SIZES = ("vocab_size", "hidden_dim", "n_blocks", "n_heads", "model_length")
COND_DIM = 129  # where config.json names none
# rows of the table -> the mask's id: bert-base-uncased has one of its own, GPT-2 gets one more token
MASKS = {30_522: 103, 50_258: 50_257}

# field of config.json: (the original's default, the values that are computed exactly)
_EXPRESSIBLE: dict[str, tuple[Any, list[Any]]] = {
    "time_conditioning": (False, [False]),  # a sampler that fills masks has no time to give
    "causal": (False, [False]),
    "quantization_config": (None, [None]),
}
# part of a training's configuration: (values that make a network that fills masks, what others are)
_FILLS_MASKS = {
    "backbone": (("dit", "hf_dit"), "another network than the DiT"),
    "diffusion": (("absorbing_state", None), "a diffusion without masks"),
    "parameterization": (("subs",), "an output that is no distribution of the clean token, or not over masks"),
    "name": (("mdlm", None), "uniform-state diffusion, or another method that fills no masks"),
    "time_conditioning": (
        (False, None),
        "a network that reads the time, which a sampler that fills masks does not give",
    ),
    "causal_attention": ((False, None), "a network that reads from left to right"),
}


def is_mdlm_config(config: dict) -> bool:
    return config.get("model_type") == MDLM


def config_from_mdlm(config: dict) -> dict:
    """Fields of config.json -> keyword arguments of `DitConfig`.

    Dropout rates are not carried over: this body has no dropout.
    Errors: UsageError that names the field: missing, impossible, or more than this body computes.
    """
    require_computed(config, "MDLM", _EXPRESSIBLE, EXAMPLE)
    positive_of = partial(positive, "MDLM", config)
    sizes = {name: positive_of(name) for name in SIZES}
    if sizes["hidden_dim"] % sizes["n_heads"] or (sizes["hidden_dim"] // sizes["n_heads"]) % 2:
        raise UsageError(
            f"the MDLM config's hidden_dim {sizes['hidden_dim']} does not give n_heads {sizes['n_heads']} an even width each"
        )
    return {
        **sizes,
        "cond_dim": positive_of("cond_dim", default=COND_DIM),
        "mask_token_id": _mask_id(config, sizes["vocab_size"]),
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
    }


def _mask_id(config: dict, rows: int) -> int:
    value = config.get("mask_token_id", MASKS.get(rows))
    if value is None:
        raise UsageError(
            f"the MDLM config has no mask_token_id, and with a table of {rows} rows it cannot be guessed; add "
            '"mask_token_id": ID to config.json: the id of the tokenizer\'s mask token, or the last row where it has none'
        )
    return row_of_table("MDLM", "mask_token_id", value, rows)


def config_from_training(training: dict, shapes: dict[str, tuple[int, ...]]) -> dict:
    """The configuration of a training of MDLM's or Duo's code, and the shapes of its weights -> fields of config.json.

    shapes: by the names of `DitModel`. MDLM's code has the options of the method at the top, Duo's under `algo`.
    Errors: UsageError that names the option, where it trained no network that fills masks, or leaves a size open.
    """
    options = training | (training.get("algo") or {})
    for name, (accepted, otherwise) in _FILLS_MASKS.items():
        if options.get(name) not in accepted:
            raise UsageError(
                f"the checkpoint was trained with {name}={options.get(name)}: {otherwise}; only MDLM's models (a DiT that "
                "fills masks, without the time) are read"
            )
    body = training.get("model") or {}
    heads, length = (positive("training", body, name) for name in ("n_heads", "length"))
    rows, width = shapes["backbone.vocab_embed.embedding"]
    blocks = {name.split(".")[2] for name in shapes if name.startswith("backbone.blocks.")}
    return {
        "model_type": MDLM,
        "architectures": ["MDLM"],
        "vocab_size": rows,
        "hidden_dim": width,
        "cond_dim": shapes["backbone.sigma_map.mlp.2.weight"][0],
        "n_blocks": len(blocks),
        "n_heads": heads,
        "model_length": length,
        "time_conditioning": False,
    }
