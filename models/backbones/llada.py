"""LLaDA: a Llama-shaped body in which every token sees every other one.

Built on transformers' own Llama modules; only the mask and the attention function differ. Saved with
`save_pretrained` (safetensors + config.json); `load_llada` reads such folders and the published ones, `build_llada`
starts from random weights.
Legend: B batch, L length, D width, V vocabulary, H heads, K prefix length.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import (
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
    repeat_kv,
)

from models.backbones import checkpoint_files as files
from models.backbones.column_cache import ColumnCache
from models.backbones.dit_layout import is_mdlm_config
from models.backbones.dream_layout import is_dream_config
from models.backbones.neighbours import require_neighbour_heads, turn_to_neighbours
from models.backbones.official_layout import config_from_official, is_official_config, official_to_leap_key
from models.backbones.other_layouts import refuse_unsupported
from models.backbones.sizes import require_fitting_sizes
from models.functional.attention import (
    bidirectional_attention,
    gated_prefix_attention,
    padding_mask,
    positions_from_mask,
)
from models.functional.block_diffusion import block_attention, block_numbers
from models.functional.errors import UsageError


class Prefix(NamedTuple):
    """What a soft prompt puts before the text in every layer; rotary positions are not applied to it."""

    keys: Tensor  # (layers, B, H_kv, K, d)
    values: Tensor  # (layers, B, H_kv, K, d)
    gate: Tensor  # (layers, H), >= 0


def prefix_heads(config: PreTrainedConfig) -> tuple[int, int]:
    """How many key-value heads a layer has, and their width d."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, width


def _leap_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    prefix: Prefix | None = None,
    kept: ColumnCache | None = None,
    **_,
) -> tuple[Tensor, None]:
    """The attention that transformers calls in each layer: (B, H, L, d) in, (B, L, H, d) out."""
    groups, layer = getattr(module, "num_key_value_groups", 1), module.layer_idx
    if kept is not None:
        key, value = kept.put(layer, key, value)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if prefix is None:
        out = bidirectional_attention(query, key, value, attention_mask, scaling)
    else:
        # a soft prompt trains in float32 even where the base is kept in half precision
        keys, values, gate = (part[layer].to(query.dtype) for part in prefix)
        k_prefix, v_prefix = repeat_kv(keys, groups), repeat_kv(values, groups)
        out = gated_prefix_attention(query, key, value, attention_mask, k_prefix, v_prefix, gate, scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("leap_bidirectional", _leap_attention)


class LladaConfig(LlamaConfig):
    """LlamaConfig plus the id of the mask token, and who sees whom.

    block_causal: a response position sees its own block of `block_length` positions (None: all of the response) and what lies
    before it, and a prompt sees itself alone (`block_attention`). Otherwise every position sees every other one.
    """

    model_type = "leap_llada"

    def __init__(
        self,
        mask_token_id: int | None = None,
        block_causal: bool = False,
        block_length: int | None = None,
        **kwargs,
    ) -> None:
        kwargs.setdefault("use_cache", False)
        kwargs["attn_implementation"] = "leap_bidirectional"
        super().__init__(**kwargs)
        self.mask_token_id = mask_token_id
        self.block_causal, self.block_length = block_causal, block_length


class LladaModel(LlamaPreTrainedModel):
    """Masked diffusion language model: `forward` gives logits, `hidden` and `lm_head` its two halves.

    Call the halves yourself where only some positions need the vocabulary-wide product.
    """

    config_class = LladaConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LladaConfig) -> None:
        config._attn_implementation = "leap_bidirectional"
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def mask_id(self) -> int:
        return self.config.mask_token_id

    @property
    def embedding(self) -> Tensor:
        """(V, D)"""
        return self.model.embed_tokens.weight

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)"""
        return self.model.embed_tokens(input_ids)

    def hidden(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        prefix: Prefix | None = None,
        response_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D), (B, L) bool -> (B, L, D), after the last norm.

        response_mask (B, L) bool: read where attention is block-causal; None is a row without a prompt.
        """
        return self.states(inputs_embeds, *self.layout(attention_mask, response_mask), prefix=prefix)

    def layout(self, attention_mask: Tensor, response_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Who sees whom, (B, 1, L, L) bool, and positions, (B, L)."""
        positions = positions_from_mask(attention_mask)
        if not self.config.block_causal:
            return padding_mask(attention_mask), positions
        seen = attention_mask.bool()
        block = block_numbers(seen if response_mask is None else response_mask, self.config.block_length)
        return block_attention(block, torch.zeros_like(seen), seen), positions

    def states(
        self,
        inputs_embeds: Tensor,
        visible: Tensor,
        positions: Tensor,
        *,
        prefix: Prefix | None = None,
        kept: ColumnCache | None = None,
    ) -> Tensor:
        """(B, Q, D) columns, the keys that each sees (B, 1, Q, K) bool, positions (B, Q) -> (B, Q, D) after the last norm.

        kept: keys and values of further columns, which become those of this pass in its own columns; without it K = Q.
        """
        return self.model(
            inputs_embeds=inputs_embeds.to(self.embedding.dtype),
            attention_mask=visible,
            position_ids=positions,
            use_cache=False,
            prefix=prefix,
            kept=kept,
        ).last_hidden_state

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, prefix: Prefix | None = None) -> Tensor:
        """(B, L) ids -> (B, L, V) logits of the clean token at every position."""
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape).bool()
        return self.lm_head(self.hidden(self.embed(input_ids), attention_mask, prefix))


class ExactRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary frequencies that stay in float32 whatever the model is cast to.

    Rounded to bfloat16 they are up to 0.4 % off: whole radians at position 1000.
    """

    inv_freq: Tensor

    def _apply(self, fn, recurse: bool = True) -> "ExactRotaryEmbedding":
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != exact.dtype:
            self.inv_freq = self.original_inv_freq = exact.to(self.inv_freq.device)
        return self


def build_llada(
    *,
    vocab_size: int,
    mask_token_id: int | None,
    eos_token_id: int,
    pad_token_id: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    intermediate_size: int,
    max_position_embeddings: int,
    rope_theta: float,
    rms_norm_eps: float = 1e-5,
    tie_word_embeddings: bool = False,
    initializer_range: float = 0.02,
    neighbour_heads: int = 0,
) -> LladaModel:
    """A model with fresh random weights in float32, drawn from torch's global generator.

    initializer_range: their spread; 0.02 suits wide models, about 1 / sqrt(hidden_size) narrow ones.
    neighbour_heads: so many key-value heads of each layer start out looking at the token before, the one after, and so on,
        by biases on queries and keys; 0 gives a body without biases.
    Errors: UsageError that names model.<option>, where the sizes do not fit together.
    """
    options = {name: value for name, value in locals().items() if name != "neighbour_heads"}
    if mask_token_id is None:
        raise UsageError(
            "the corpus' tokenizer has no mask token, which this network needs; add one to its folder "
            "(tokenizer.add_special_tokens({'mask_token': '<mask>'}), then save_pretrained) or type data.tokenizer=bpe"
        )
    options["num_key_value_heads"] = num_key_value_heads or num_attention_heads
    require_fitting_sizes(options)
    require_neighbour_heads(neighbour_heads, options["num_key_value_heads"])
    rope = {"rope_type": "default", "rope_theta": float(options.pop("rope_theta"))}
    config = LladaConfig(**options, rope_parameters=rope, bos_token_id=None, attention_bias=neighbour_heads > 0)
    model = _construct(config)
    turn_to_neighbours(model, neighbour_heads)
    return model


def load_llada(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    option: str = "model.path",
) -> LladaModel:
    """A model from a folder that `save_pretrained` wrote, from a published LLaDA folder, or from the hub by name.

    `dtype` "auto" keeps the type that the embedding table is stored in. The model is built without memory and filled
    shard by shard, so that one copy of the weights is the most it takes; nothing in the folder is run or unpickled.
    option: what `path` is the value of, as errors name it.
    Errors: UsageError for a folder or hub name that does not exist, files cut short, another architecture, and tensors
    that are missing, unexpected or of another shape; it names them and what to type.
    """
    device, wanted = files.parse_device(device), None if dtype == "auto" else files.parse_dtype(dtype)
    folder = files.find_folder(path, option)
    config = read_config(folder, option)
    with torch.device("meta"):
        model = _construct(config)
    expected = files.expected_shapes(model, tied=config.tie_word_embeddings)
    stored = files.list_tensors(folder)
    names = files.match_names(expected, stored, official_to_leap_key, folder)
    dtype = wanted or stored[names["model.embed_tokens.weight"]].dtype
    files.fill_model(model, names, stored, dtype, device)
    # No file holds the tied head, nor the rotary frequencies.
    model.tie_weights()
    model.model.rotary_emb = ExactRotaryEmbedding(config).to(device)
    return model


def read_config(folder: Path, option: str = "model.path") -> LladaConfig:
    """config.json in our own or the published field names. Errors: UsageError where it is of another architecture."""
    fields = files.read_json(folder / "config.json")
    kind = fields.get("model_type")
    refuse_unsupported(fields, str(folder))
    try:
        if kind == LladaConfig.model_type:
            config = LladaConfig.from_dict(fields)
        elif is_official_config(fields):
            config = LladaConfig(**config_from_official(fields))
        elif is_dream_config(fields):
            raise UsageError(
                f"{folder} holds a Dream model, not LLaDA; type teacher.path={folder}, or model=from_causal "
                f"model.conversion=bidirectional model.path={folder}"
            )
        elif is_mdlm_config(fields):
            raise UsageError(
                f"{folder} holds an MDLM model, not LLaDA; type teacher.path={folder}, or model=mdlm model.path={folder}"
            )
        else:
            raise UsageError(
                f"{folder} holds a {kind or 'nameless'} model, not LLaDA. Causal models (Llama, Qwen, GPT-2, ...) were "
                f"trained to look backwards only and cannot fill masks; type {option}=GSAI-ML/LLaDA-8B-Instruct or a "
                "folder that this framework saved"
            )
    except StrictDataclassError as error:
        raise UsageError(f"{folder / 'config.json'}: {error}; copy or download it again") from error
    if config.mask_token_id is None:
        raise UsageError(f"{folder / 'config.json'} has no mask_token_id; add the id of the tokenizer's mask token")
    return config


def _construct(config: LladaConfig) -> LladaModel:
    """`LladaModel(config)` whose padding row trains like any other and whose rotary frequencies stay exact.

    LLaDA pads with its end token, and torch would give the embedding of a padding id neither a start nor a gradient.
    """
    pad_token_id, config.pad_token_id = config.pad_token_id, None
    model = LladaModel(config)
    config.pad_token_id = pad_token_id
    model.model.rotary_emb = ExactRotaryEmbedding(config)
    return model
