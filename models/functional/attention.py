r"""Bidirectional attention, and attention that also sees a gated prefix.

Legend: B batch, H heads, L length, K prefix length, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q kᵀ scale) v without a causal mask. q, k, v (B, H, L, d); mask bool (B, 1, 1|L, L), True = may be seen."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def gated_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, k_prefix: Tensor, v_prefix: Tensor, gate: Tensor, scale: float
) -> Tensor:
    r"""Attention over text and prefix with the prefix' softmax mass multiplied by a gate g >= 0.

    .. math:: o = \frac{\sum_j e^{s_j} v_j + g \sum_p e^{s_p} v_p}{\sum_j e^{s_j} + g \sum_p e^{s_p}}

    g = 0 is exactly `bidirectional_attention` and still has a live gradient in g (a zero prefix would take softmax mass;
    a -inf bias could never train); g = 1 is ordinary attention with the prefix put before every key and value.

    q, k, v (B, H, L, d); mask bool (B, 1, 1|L, L); k_prefix, v_prefix (B, H, K, d); gate (H,). Returns (B, H, L, d).
    Written with plain matmul and softmax so that forward-mode derivatives pass through it.
    """
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale  # (B, H, L, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    prefix_scores = torch.matmul(q, k_prefix.transpose(-1, -2)) * scale  # (B, H, L, K)
    weights = torch.softmax(torch.cat([prefix_scores, scores], dim=-1), dim=-1)
    prefix_length = k_prefix.shape[-2]
    prefix_weights = weights[..., :prefix_length] * gate.view(1, -1, 1, 1)
    text_weights = weights[..., prefix_length:]
    mass = prefix_weights.sum(-1, keepdim=True) + text_weights.sum(-1, keepdim=True)
    return (torch.matmul(prefix_weights, v_prefix) + torch.matmul(text_weights, v)) / mass


def padding_mask(attention_mask: Tensor) -> Tensor:
    """(B, L) bool, True = real token -> (B, 1, L, L) bool: every query sees every real key."""
    batch, length = attention_mask.shape
    return attention_mask.bool()[:, None, None, :].expand(batch, 1, length, length)


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, L) bool -> (B, L) int64: 0, 1, 2 ... over the real tokens, so left padding changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
