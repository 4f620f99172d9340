r"""Bidirectional attention, attention over text and a gated prefix, and masks.

Legend: B batch, H heads, L length, K prefix length, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

from models.functional.precision import at_least_float32, to_autocast_dtype, without_autocast

MOST_OF_PREFIX = 30.0  # nats by which a prefix may outscore the text in the derivative of its gate
MOST_ABOVE = 10.0  # nats by which a hidden key may outscore the seen ones


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q kᵀ scale) v without a causal mask. q, k, v (B, H, L, d); mask bool (B, 1, 1|L, L), True = visible."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def gated_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, k_prefix: Tensor, v_prefix: Tensor, gate: Tensor, scale: float
) -> Tensor:
    r"""Attention over text and prefix with the prefix' softmax mass multiplied by a gate g >= 0.

    .. math:: o = \frac{\sum_j e^{s_j} v_j + g \sum_p e^{s_p} v_p}{\sum_j e^{s_j} + g \sum_p e^{s_p}}

    g = 0 is exactly `bidirectional_attention` and still has a live gradient in g (a zero prefix would take softmax mass;
    a -inf bias could never train); g = 1 is ordinary attention with the prefix put before every key and value.

    q, k, v (B, H, L, d); mask bool (B, 1, 1|L, L); k_prefix, v_prefix (B, H, K, d); gate (H,). Returns (B, H, L, d).
    Scores and their softmax are computed in float32 at least. A query that sees neither text nor prefix gets 0.

    There are first derivatives only, but in forward mode too, which fused kernels lack. Without derivatives a fused kernel
    computes the same. The derivative in g, which is unbounded at g = 0, counts a prefix that outscores the text by more than
    30 nats as if by 30.
    """
    inputs = (q, k, v, k_prefix, v_prefix, gate)
    differentiated = torch.is_grad_enabled() or any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)
    q, k, v, k_prefix, v_prefix, gate = to_autocast_dtype(*inputs)
    if not differentiated:
        return _fused_prefix_attention(q, k, v, mask, k_prefix, v_prefix, gate, scale)
    with without_autocast(q):
        return _GatedPrefixAttention.apply(q, k, v, mask, k_prefix, v_prefix, gate, scale)[0]


def _fused_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, k_prefix: Tensor, v_prefix: Tensor, gate: Tensor, scale: float
) -> Tensor:
    """The same without derivatives: a prefix whose scores are raised by log g, in one fused kernel."""
    batch, heads, length, _ = q.shape
    width = k_prefix.shape[2]
    bias = q.new_zeros(batch, heads, length, width + length)
    bias[..., :width] = gate.clamp(min=0).log().view(1, heads, 1, 1)
    if mask is not None:
        bias[..., width:] = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    keys, values = _put_before(k_prefix, k), _put_before(v_prefix, v)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale)


def visible_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    r"""Causal attention in which each key has a weight w >= 0; with weights of 0 and 1 it is masked attention.

    .. math:: o_q = \sum_{k \le q} w_{qk} e^{s_{qk}} v_k \Big/ \sum_{k \le q} w_{qk} e^{s_{qk}}

    A mask of -inf would pass no gradient to the keys that it hides; w does. q, k, v (B, H, L, d), w (B, 1, L, L).
    """
    scores = (q @ k.mT) * scale
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(ahead, -torch.inf)
    top = scores.masked_fill(visible == 0, -torch.inf).amax(-1, keepdim=True).detach()
    # a hidden key may score far above the visible ones: its share is bounded, and never infinite
    weights = visible * (scores - top).clamp(max=MOST_ABOVE).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def _put_before(prefix: Tensor, text: Tensor) -> Tensor:
    """(B or 1, H, K, d), (B, H, L, d) -> (B, H, K + L, d)."""
    return torch.cat([prefix.expand(len(text), -1, -1, -1), text], 2)


class _GatedPrefixAttention(Function):
    """One softmax over prefix and text, in which each key of the prefix counts g times.

    Its derivatives are those of a softmax, dw_j = w_j (ds_j - mean). The gate's needs the share of a key that counts once,
    which is above 0 at g = 0 too. The forward-mode derivative is not recorded for a later backward pass.
    """

    @staticmethod
    def forward(q, k, v, mask, k_prefix, v_prefix, gate, scale):
        # Sums over keys are (B, H, L, 1). A prefix further above the text than `MOST_OF_PREFIX` is `far`: its mass follows from
        # the odds of prefix against text, which no exponential of a score can overflow.
        prefix, text = slice(k_prefix.shape[2]), slice(k_prefix.shape[2], None)
        keys, values = _put_before(k_prefix, k), _put_before(v_prefix, v)
        gate = at_least_float32(gate).view(1, -1, 1, 1)
        # 1. scores, and by how many nats the prefix outscores the text
        scores = at_least_float32(q) @ at_least_float32(keys).mT * scale
        lowest = torch.finfo(scores.dtype).min
        if mask is not None:
            scores[..., text].masked_fill_(~mask, lowest)
        of_prefix, of_text = (scores[..., keys_of].logsumexp(-1, keepdim=True) for keys_of in (prefix, text))
        above = of_prefix - of_text
        far, log_odds = above > MOST_OF_PREFIX, above + gate.clamp(min=0).log()
        # 2. the mass of every key beside a text of mass 1, those of the prefix counted once
        scores[..., prefix] += above.clamp(max=MOST_OF_PREFIX) - of_prefix
        scores[..., text] -= of_text
        weights = scores.exp()
        prefix_mass, text_mass = weights[..., prefix].sum(-1, keepdim=True), weights[..., text].sum(-1, keepdim=True)
        total = text_mass + gate * prefix_mass
        # 3. shares of the total; where all of the text is hidden it has none
        shared = torch.where(far, text_mass * (1 + log_odds.exp()), total).masked_fill(of_text < lowest / 2, torch.inf)
        weights[..., text] /= shared
        weights[..., prefix] /= total
        of_gate = weights[..., prefix].to(q.dtype, copy=True)
        weights[..., prefix] *= torch.where(far, log_odds.sigmoid() * total / prefix_mass, gate)
        weights = weights.to(q.dtype)
        return weights @ values, weights, of_gate, keys, values

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, ctx.scale, ctx.prefix_length = inputs[0], inputs[-1], inputs[4].shape[2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, *output)
        ctx.save_for_forward(q, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        q, out, weights, of_gate, keys, values = ctx.saved_tensors
        apart = grad @ values.mT - (grad * out).sum(-1, keepdim=True)  # d out / d (a key's share of mass)
        gate = (of_gate * apart[..., : ctx.prefix_length]).sum((0, 2, 3))
        ds = apart * weights * ctx.scale
        dk, dv = ds.mT @ q, weights.mT @ grad
        (dk_prefix, dk), (dv_prefix, dv) = (x.tensor_split([ctx.prefix_length], 2) for x in (dk, dv))
        return ds @ keys, dk, dv, None, dk_prefix, dv_prefix, gate, None

    @staticmethod
    @torch.no_grad()
    def jvp(ctx, dq, dk, dv, _mask, dk_prefix, dv_prefix, dgate, _scale):
        q, out, weights, of_gate, keys, values = ctx.saved_tensors
        (k_prefix, k), (v_prefix, v) = (x.tensor_split([ctx.prefix_length], 2) for x in (keys, values))
        given = zip((dq, dk, dv, dk_prefix, dv_prefix), (q, k, v, k_prefix, v_prefix), strict=True)
        dq, dk, dv, dk_prefix, dv_prefix = (torch.zeros_like(x) if dx is None else dx for dx, x in given)
        dkeys, dvalues = _put_before(dk_prefix, dk), _put_before(dv_prefix, dv)
        ds = (dq @ keys.mT + q @ dkeys.mT) * weights * ctx.scale
        tangent = ds @ values - ds.sum(-1, keepdim=True) * out + weights @ dvalues
        if dgate is not None:
            moved = of_gate @ v_prefix - of_gate.sum(-1, keepdim=True) * out
            tangent = tangent + dgate.view(1, -1, 1, 1) * moved
        return tangent, None, None, None, None


def response_attention(
    seen: Tensor, response: Tensor, *, block_length: int | None = None, prompt_sees_response: bool = False
) -> Tensor:
    """Who sees whom in a row of prompt and response: (B, 1, L, L) bool.

    The prompt is causal and never sees the response. A response position sees the prompt, its own block of `block_length`
    positions and the blocks before it; None: the whole response. With a block length of 1 all attention is causal.
    seen (B, L) bool is False on padding; response (B, L) bool. prompt_sees_response: every position sees every other one.
    A padding query sees itself, so that no row of scores is empty.
    """
    columns = torch.arange(seen.shape[-1], device=seen.device)
    allowed = columns <= columns.unsqueeze(-1)
    if prompt_sees_response:
        allowed = torch.ones_like(allowed)
    number = response.long().cumsum(-1) - 1  # of a response position in its response
    block = torch.zeros_like(number) if block_length is None else number // block_length
    own = response.unsqueeze(-1) & response.unsqueeze(-2) & (block.unsqueeze(-2) <= block.unsqueeze(-1))
    itself = torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
    return (((allowed | own) & seen.unsqueeze(-2)) | itself).unsqueeze(1)


def versions_side_by_side(visible: Tensor, first: int, versions: int) -> tuple[Tensor, Tensor]:
    """Rows whose columns from `first` on stand there in several versions, which do not see each other.

    visible (B, 1, L, L) bool: who sees whom in a row of one version. No column before `first` may see one from there on.
    Returns who sees whom (B, 1, N, N), and of which column of a row each of the N = first + versions (L - first) is one, (N,).
    """
    length = visible.shape[-1]
    before, after = (torch.arange(*ends, device=visible.device) for ends in ((0, first), (first, length)))
    column = torch.cat([before, after.repeat(versions)])
    number = torch.arange(versions, device=visible.device).repeat_interleave(length - first)
    version = torch.cat([torch.full_like(before, -1), number])  # -1: part of all of them
    together = (version == -1) | (version == version.unsqueeze(-1))
    return visible[..., column, :][..., column] & together, column


def padding_mask(attention_mask: Tensor) -> Tensor:
    """(B, L) bool, True = real token -> (B, 1, L, L) bool: every query sees every real key."""
    batch, length = attention_mask.shape
    return attention_mask.bool()[:, None, None, :].expand(batch, 1, length, length)


def document_attention_mask(document_ids: Tensor, *, causal: bool) -> Tensor:
    """(B, L) int -> (B, 1, L, L) bool: every query sees its own document's keys, only those up to itself where causal."""
    own = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return own.tril() if causal else own


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, L) bool -> (B, L) int64: 0, 1, 2 ... over the real tokens, so left padding changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
