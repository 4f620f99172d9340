"""Attention of the deep layers: SDPA with a boolean mask, FlexAttention with a block mask, or a soft mask with a gradient.

FlexAttention skips blocks that are masked as a whole. So slots are sorted to [concepts | NULLs], each in the order of the
text: concept queries then skip all NULL keys, and NULL queries all NULL keys far from the diagonal.
Legend: B batch, T positions, H heads, d head width.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from models.functional.attention import visible_attention
from models.functional.commits import Packing
from models.online.options import Attention, Gate

NAME = "leap_concepts"


class Visible(NamedTuple):
    """A soft mask of dense attention: how much of each key a query sees, (B, 1, T, T), with a gradient."""

    share: Tensor


@cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def concept_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | Visible | None,
    **options,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (B, H, T, d), key and value of their own heads -> (B, T, H, d)."""
    if isinstance(attention_mask, Visible):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        out = visible_attention(query, key, value, attention_mask.share.to(query.dtype), options["scaling"])
        return out.transpose(1, 2).contiguous(), None
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    flex = _compiled_flex() if query.is_cuda else flex_attention
    grouped = query.shape[1] != key.shape[1]
    out = flex(query, key, value, block_mask=attention_mask, scale=options.get("scaling"), enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def use_attention(model: nn.Module, attention: Attention, gate: Gate) -> None:
    """Make the model's layers accept block masks and soft masks, where these are needed."""
    if attention == "flex" or gate == "visibility":
        AttentionInterface.register(NAME, concept_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.config._attn_implementation = NAME


def concepts_first(commit: Tensor) -> Tensor:
    """The order (B, T) of slots: commits, then NULLs, each in the order of the text."""
    return (~commit).long().argsort(dim=1, stable=True)


def deep_block_mask(
    commit: Tensor, packing: Packing, valid: Tensor, order: Tensor, documents: Tensor | None = None
) -> BlockMask:
    """`commits.deep_mask` as a block mask, of slots in `order`; all (B, T)."""
    documents = torch.zeros_like(order) if documents is None else documents
    own, segment, real, document = (x.gather(1, order) for x in (commit, packing.segment, valid, documents))

    def allow(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (order[b, k] <= order[b, q]) & real[b, k] & (own[b, k] | (segment[b, q] == segment[b, k]))
        return (seen & (document[b, q] == document[b, k])) | (q == k)

    return create_block_mask(allow, len(commit), None, commit.shape[1], commit.shape[1], device=commit.device)
