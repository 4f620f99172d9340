"""Small causal bodies with fresh weights, as plain Hugging Face models: `save_pretrained` writes a folder that any reads."""

from typing import Literal, NotRequired, TypedDict, Unpack, get_args

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from models.backbones.llada import build_llada
from models.backbones.neighbours import require_neighbour_heads, turn_to_neighbours
from models.backbones.sizes import require_fitting_sizes
from models.functional.errors import UsageError, require_choice

Architecture = Literal["llama", "qwen3"]
Attention = Literal["causal", "bidirectional"]
DRAWN = ("architecture", "initializer_range", "embedding_range", "neighbour_heads")  # no sizes
CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def build_causal(
    *,
    vocab_size: int,
    mask_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    intermediate_size: int,
    max_position_embeddings: int,
    rope_theta: float,
    rms_norm_eps: float = 1e-5,
    tie_word_embeddings: bool = False,
    architecture: Architecture = "llama",
    initializer_range: float = 0.02,
    embedding_range: float | None = None,
    neighbour_heads: int = 0,
) -> PreTrainedModel:
    """A causal model with fresh random weights in float32, drawn from torch's global generator.

    initializer_range: their spread. That of transformers, 0.02, suits widths of a thousand and more; a narrow model whose
    layers are to have an effect from the start needs about 1 / sqrt(hidden_size). embedding_range: that of token embeddings,
    None the same; a wider one keeps what a token is above what fresh layers add to it (Takase et al., 2312.16903).
    neighbour_heads: as of `build_llada`, of a llama that is read without a causal mask, too; under the mask the token after
    is not seen.

    The options are those of `build_llada`, so that bodies of both kinds have the same sizes; the mask's id is only noted.
    Errors: UsageError that names model.<option>, where the sizes do not fit together.
    """
    sizes = {name: value for name, value in locals().items() if name not in DRAWN}
    require_choice("model.architecture", architecture, get_args(Architecture))
    sizes["num_key_value_heads"] = num_key_value_heads or num_attention_heads
    require_fitting_sizes(sizes)
    require_neighbour_heads(neighbour_heads, sizes["num_key_value_heads"])
    if neighbour_heads and architecture != "llama":
        raise UsageError(
            f"model.neighbour_heads={neighbour_heads}: the queries of {architecture} are normalised after their biases; type "
            "model.architecture=llama or model.neighbour_heads=0"
        )
    rope = {"rope_type": "default", "rope_theta": float(sizes.pop("rope_theta"))}
    config_class, model_class = CLASSES[architecture]
    # the embedding of a padding id would get neither a start nor a gradient
    padding = sizes.pop("pad_token_id")
    drawn = {"rope_parameters": rope, "initializer_range": initializer_range, "use_cache": False}
    if neighbour_heads:
        drawn["attention_bias"] = True
    config = config_class(**sizes, head_dim=hidden_size // num_attention_heads, **drawn)
    model = model_class(config)
    model.config.pad_token_id = padding
    if embedding_range is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(embedding_range / initializer_range)
    turn_to_neighbours(model, neighbour_heads)
    return model


class BodySizes(TypedDict):
    """What `build_causal` and `build_llada` have in common."""

    vocab_size: int
    mask_token_id: int | None
    eos_token_id: int
    pad_token_id: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: NotRequired[int | None]
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: NotRequired[float]
    tie_word_embeddings: NotRequired[bool]
    initializer_range: NotRequired[float]
    neighbour_heads: NotRequired[int]


def build_body(
    *, attention: Attention | None = None, architecture: Architecture = "llama", **sizes: Unpack[BodySizes]
) -> torch.nn.Module:
    """A body of the same sizes with `causal` or `bidirectional` attention (LLaDA's).

    Errors: UsageError where neither the options nor the objective has said which.
    """
    if attention is None:
        raise UsageError("model.attention has no value; type model.attention=causal or model.attention=bidirectional")
    require_choice("model.attention", attention, get_args(Attention))
    return build_causal(architecture=architecture, **sizes) if attention == "causal" else build_llada(**sizes)
