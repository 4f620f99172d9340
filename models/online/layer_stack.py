"""Consecutive layers of a Hugging Face decoder, called one by one with hidden states, positions and a mask.

Legend: B batch, T positions, n rows of a step, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig

from models.backbones.abilities import limited_layers
from models.backbones.key_value_cache import cache_argument
from models.functional.commits import text_mask
from models.functional.errors import UsageError
from models.online.attention import Visible
from models.online.row_cache import RowCache

PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
MASKED = ("sdpa", "leap_concepts")  # attention implementations that take a boolean mask


class LayerStack:
    """Layers start .. stop - 1 of a decoder in the layout of Llama and Qwen3. No module: the decoder owns the weights."""

    def __init__(self, decoder: nn.Module, start: int, stop: int) -> None:
        self.decoder, self.start, self.stop = decoder, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def run(
        self,
        states: Tensor,
        positions: Tensor,
        mask: Tensor | BlockMask | Visible | None,
        cache: RowCache | None = None,
    ) -> Tensor:
        """(B, T, D), (B, T) -> (B, T, D); mask (B, 1, T, T) bool, or as `concept_attention` takes it; None is causal."""
        rotary = self.decoder.rotary_emb(states, positions)
        for layer in self.decoder.layers[self.start : self.stop]:
            states = layer(
                states,
                attention_mask=mask,
                position_ids=positions,
                **cache_argument(cache),
                use_cache=cache is not None,
                position_embeddings=rotary,
            )
        return states

    # -- a causal stage of its own ---------------------------------------------------------------------

    def read(
        self,
        states: Tensor,
        positions: Tensor,
        valid: Tensor,
        cache: RowCache | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """A whole text, or rows of several documents (B, T); valid (B, T) bool is False on padding. A cache keeps all of it."""
        out = self.run(states, positions, text_mask(valid, documents), cache)
        if cache is not None:
            cache.keep(valid)
        return out

    def step(self, states: Tensor, positions: Tensor, cache: RowCache, rows: Tensor) -> Tensor:
        """One position (n, 1, D) of rows (n,), which attend to what the cache has of them."""
        out = self.run(states, positions, cache.begin(rows), cache)
        cache.end()
        return out


def require_split(split: list, layers: int) -> None:
    """Raise UsageError unless split is [shallow, middle, deep], middle a number or again such a list, and has all layers."""
    advice = f"type for example module.split={suggested_split(layers)}"
    if not _is_split(split):
        raise UsageError(
            f"module.split={split} must be [shallow, middle, deep] with at least one layer each, the middle a number or again "
            f"such a list; {advice}"
        )
    if split_size(split) != layers:
        raise UsageError(f"module.split={split} has {split_size(split)} layers, the model {layers}; {advice}")


def _is_split(split: list) -> bool:
    parts = [part for part in split if not isinstance(part, list)]
    inner = len(split) == 3 and isinstance(split[1], list)
    return len(parts) == 3 - inner and all(part >= 1 for part in parts) and (not inner or _is_split(split[1]))


def split_size(split: list) -> int:
    """Layers of a split, of all its levels."""
    return split[0] + (split_size(split[1]) if isinstance(split[1], list) else split[1]) + split[2]


def suggested_split(layers: int) -> list[int]:
    """2 : 3 : 2 of the layers, [8, 12, 8] of 28."""
    if layers < 3:
        raise UsageError(
            f"model.num_hidden_layers={layers} cannot be split in three; type model.num_hidden_layers=3 or more"
        )
    ends = max(1, round(layers * 2 / 7))
    return [ends, max(1, layers - 2 * ends), ends]


def whole_split(split: list | None, levels: int, layers: int) -> list:
    """The split of a model of so many layers, with all its levels. Raises UsageError for one that does not fit."""
    split = suggested_split(layers) if split is None else list(split)
    require_split(split, layers)
    if levels > 1 and isinstance(split[1], list):
        raise UsageError(
            f"module.levels={levels} splits the middle itself; type module.levels=1, or a number in module.split={split}"
        )
    split = nested_split(split, levels)
    require_split(split, layers)
    return split


def nested_split(split: list, levels: int) -> list:
    """The same proportions once more inside the middle for each further level."""
    if levels == 1:
        return split
    shallow, middle, deep = split
    total = split_size(split)
    first, last = (max(1, round(middle * part / total)) for part in (shallow, deep))
    return [shallow, nested_split([first, middle - first - last, last], levels - 1), deep]


def require_layout(model: nn.Module) -> nn.Module:
    """The decoder of a causal LM whose layers can be called one by one. Raises UsageError for others."""
    config: PreTrainedConfig = model.config
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    missing = [part for part in PARTS if not hasattr(decoder, part)]
    if missing:
        raise UsageError(
            f"{getattr(config, 'model_type', type(model).__name__)} has no {', '.join(missing)} where Llama and Qwen3 have "
            "them, so its layers cannot be split; type a model of such a layout, such as model.path=Qwen/Qwen3-0.6B"
        )
    if kinds := limited_layers(config.get_text_config()):
        raise UsageError(
            f"{config.model_type} has layers of {', '.join(sorted(kinds))}; concepts need full causal attention: type a model "
            "without them, such as model.path=Qwen/Qwen3-0.6B"
        )
    if config._attn_implementation not in MASKED:
        raise UsageError(f"attention {config._attn_implementation} takes no boolean mask; the model needs sdpa")
    return decoder


@torch.no_grad()
def require_same(theirs: Tensor, ours: Tensor) -> None:
    """Raise UsageError where the layers, called one by one, give other logits than the model itself."""
    scale = theirs.abs().max().clamp(min=1)
    if not torch.allclose(theirs / scale, ours / scale, atol=2e-2 if theirs.dtype == torch.bfloat16 else 1e-3):
        raise UsageError(
            "this model computes more than its layers between embedding and norm, so it cannot be split; type a model of the "
            "layout of Llama or Qwen3, such as model.path=Qwen/Qwen3-0.6B"
        )
