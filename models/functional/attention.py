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
    Computed as o_text + ρ/(1+ρ) (o_prefix - o_text) with ρ = g exp(lse_prefix - lse_text): the two softmaxes cannot
    starve each other of precision (the exponent is cut at 30, where the prefix has all of the mass). Plain matmul and
    softmax, so that forward-mode derivatives pass through.
    """
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale  # (B, H, L, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    prefix_scores = torch.matmul(q, k_prefix.transpose(-1, -2)) * scale  # (B, H, L, K)
    text = torch.matmul(torch.softmax(scores, dim=-1), v)
    prefix = torch.matmul(torch.softmax(prefix_scores, dim=-1), v_prefix)
    log_ratio = torch.logsumexp(prefix_scores, -1, keepdim=True) - torch.logsumexp(scores, -1, keepdim=True)
    ratio = gate.view(1, -1, 1, 1) * log_ratio.clamp(max=30.0).exp()
    return text + ratio / (1 + ratio) * (prefix - text)


def padding_mask(attention_mask: Tensor) -> Tensor:
    """(B, L) bool, True = real token -> (B, 1, L, L) bool: every query sees every real key."""
    batch, length = attention_mask.shape
    return attention_mask.bool()[:, None, None, :].expand(batch, 1, length, length)


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, L) bool -> (B, L) int64: 0, 1, 2 ... over the real tokens, so left padding changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
