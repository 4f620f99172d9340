"""Gated prefix attention against its limits: no prefix, an ordinary key-value cache, and its own formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from models.backbones.key_value_cache import cache_argument
from models.backbones.llada import Prefix
from models.functional.attention import (
    bidirectional_attention,
    document_attention_mask,
    gated_prefix_attention,
    positions_from_mask,
    visible_attention,
)
from models.functional.jvp import value_and_jvp


def _inputs(dtype=torch.float64):
    q, k, v = (torch.randn(2, 4, 5, 8, dtype=dtype) for _ in range(3))
    k_prefix, v_prefix = (torch.randn(2, 4, 3, 8, dtype=dtype) for _ in range(2))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, :, :, :2] = False
    return q, k, v, mask, k_prefix, v_prefix


def test_closed_gate_is_plain_attention_with_a_live_gradient():
    q, k, v, mask, k_prefix, v_prefix = _inputs()
    gate = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    out = gated_prefix_attention(q, k, v, mask, k_prefix, v_prefix, gate, 0.3)
    torch.testing.assert_close(out, bidirectional_attention(q, k, v, mask, 0.3))
    out.square().sum().backward()
    assert gate.grad.abs().min() > 1e-6


def test_open_gate_is_attention_over_prefix_and_text():
    q, k, v, mask, k_prefix, v_prefix = _inputs()
    out = gated_prefix_attention(q, k, v, mask, k_prefix, v_prefix, torch.ones(4, dtype=torch.float64), 0.3)
    both = torch.cat([torch.ones(2, 1, 5, 3, dtype=torch.bool), mask], -1)
    expected = bidirectional_attention(q, torch.cat([k_prefix, k], 2), torch.cat([v_prefix, v], 2), both, 0.3)
    torch.testing.assert_close(out, expected)


def test_half_open_gate_follows_the_formula():
    q, k, v, mask, k_prefix, v_prefix = _inputs()
    gate = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    text = torch.exp(q @ k.mT * 0.3) * mask
    prefix = torch.exp(q @ k_prefix.mT * 0.3) * gate.view(1, 4, 1, 1)
    expected = (text @ v + prefix @ v_prefix) / (text.sum(-1, keepdim=True) + prefix.sum(-1, keepdim=True))
    torch.testing.assert_close(gated_prefix_attention(q, k, v, mask, k_prefix, v_prefix, gate, 0.3), expected)


@pytest.mark.parametrize("masked", [True, False])
def test_without_derivatives_a_fused_kernel_gives_the_same_for_every_gate(masked):
    q, k, v, mask, k_prefix, v_prefix = _inputs()
    mask, gate = (mask if masked else None), torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    arguments = (q, k, v, mask, k_prefix[:1], v_prefix[:1], gate, 0.3)  # one prefix for all rows
    exact = gated_prefix_attention(*arguments)
    with torch.no_grad():
        torch.testing.assert_close(gated_prefix_attention(*arguments), exact)


@pytest.mark.parametrize("above", [20, 60, 400])
def test_a_prefix_that_outscores_the_text_by_far_has_all_of_the_mass_or_none(above):
    q, k, v, mask, k_prefix, v_prefix = (x.float() if x.is_floating_point() else x for x in _inputs())
    q[..., 0], k_prefix[..., 0], k[..., 0] = 1.0, above / 0.3, 0.0
    gate = torch.tensor([0.0, 1e-3, 1.0, 2.0], requires_grad=True)
    out = gated_prefix_attention(q, k, v, mask, k_prefix, v_prefix, gate, 0.3)
    torch.testing.assert_close(out[:, :1], bidirectional_attention(q, k, v, mask, 0.3)[:, :1])
    alone = bidirectional_attention(q, k_prefix, v_prefix, None, 0.3)
    torch.testing.assert_close(out[:, 1:], alone[:, 1:], atol=1e-4, rtol=1e-4)
    out.sum().backward()
    assert gate.grad.isfinite().all()


@pytest.mark.parametrize("above", [20, 60])
def test_far_above_the_text_too_the_forward_pass_is_the_formula_with_and_without_gradients(above):
    """A gate of e^-above, 0 or 2: half of the mass, none or nearly all."""
    q, k, v, mask, k_prefix, v_prefix = _inputs()
    q[..., 0], k_prefix[..., 0], k[..., 0] = 1.0, above / 0.3, 0.0
    gate = torch.tensor([math.exp(-above), 0.0, math.exp(1 - above), 2.0], dtype=torch.float64)
    text = torch.exp(q @ k.mT * 0.3) * mask
    prefix = torch.exp(q @ k_prefix.mT * 0.3) * gate.view(1, 4, 1, 1)
    expected = (text @ v + prefix @ v_prefix) / (text.sum(-1, keepdim=True) + prefix.sum(-1, keepdim=True))
    arguments = (q, k, v, mask, k_prefix, v_prefix, gate, 0.3)
    torch.testing.assert_close(gated_prefix_attention(*arguments), expected)
    with torch.no_grad():
        torch.testing.assert_close(gated_prefix_attention(*arguments), expected)
    inputs = [x[:1, :2, :3].detach().requires_grad_() for x in (q, k, v, k_prefix, v_prefix)]

    def attend(q, k, v, k_prefix, v_prefix):
        return gated_prefix_attention(q, k, v, None, k_prefix, v_prefix, gate[:2], 0.3)

    assert torch.autograd.gradcheck(attend, inputs, check_forward_ad=True)


def test_half_precision_has_scores_and_their_softmax_in_float32():
    """Its error is near that of the fused kernel; with a softmax in bfloat16 it was more than four times that."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 4, 32, 16) * scale for scale in (3, 1, 1))
    k_prefix, v_prefix = (torch.randn(4, 4, 8, 16) for _ in range(2))
    half = [x.bfloat16() for x in (q, k, v, k_prefix, v_prefix)]

    def attend(q, k, v, k_prefix, v_prefix):
        return gated_prefix_attention(q, k, v, None, k_prefix, v_prefix, torch.ones(4, dtype=q.dtype), 0.3)

    exact = attend(*(x.double() for x in half))
    with torch.no_grad():
        fused = (attend(*half).double() - exact).abs().mean()
    differentiated = attend(*half)
    assert differentiated.dtype == torch.bfloat16
    assert (differentiated.double() - exact).abs().mean() < 1.5 * fused


def test_a_query_that_sees_nothing_gets_nothing():
    q, k, v, mask, k_prefix, v_prefix = _inputs()
    mask[0, :, 2] = False
    arguments = (q, k, v, mask, k_prefix, v_prefix, torch.zeros(4, dtype=torch.float64), 0.3)
    assert gated_prefix_attention(*arguments)[0, :, 2].abs().max() == 0
    with torch.no_grad():
        assert gated_prefix_attention(*arguments)[0, :, 2].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_all_of_the_text_is_hidden_an_open_prefix_has_all_of_the_mass(dtype):
    q, k, v, mask, k_prefix, v_prefix = (x.to(dtype) if x.is_floating_point() else x for x in _inputs())
    mask[0, :, 2] = False
    arguments = (q, k, v + 100, mask, k_prefix, v_prefix, torch.tensor([0.5, 1.0, 1.7, 2.0], dtype=dtype), 0.3)
    alone = bidirectional_attention(q, k_prefix, v_prefix, None, 0.3)
    torch.testing.assert_close(gated_prefix_attention(*arguments)[0, :, 2], alone[0, :, 2], atol=2e-2, rtol=2e-2)
    with torch.no_grad():
        torch.testing.assert_close(gated_prefix_attention(*arguments)[0, :, 2], alone[0, :, 2], atol=2e-2, rtol=2e-2)


def test_second_derivatives_are_refused():
    q, k, v, mask, k_prefix, v_prefix = _inputs()
    q.requires_grad_()
    out = gated_prefix_attention(q, k, v, mask, k_prefix, v_prefix, torch.ones(4, dtype=torch.float64), 0.3)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_forward_derivative_is_there_even_where_gradients_are_off():
    q, k, v, mask, k_prefix, v_prefix = _inputs()
    gate, tangent = torch.full((4,), 0.7, dtype=torch.float64), torch.randn_like(q)
    attend = lambda q: gated_prefix_attention(q, k, v, mask, k_prefix, v_prefix, gate, 0.3)  # noqa: E731
    with torch.no_grad():
        _, derivative = value_and_jvp(attend, (q,), (tangent,))
        _, differences = value_and_jvp(attend, (q,), (tangent,), backend="finite_difference", step=1e-5)
    torch.testing.assert_close(derivative, differences, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("opening", [0.0, 0.7])
def test_derivatives_of_every_input_in_both_modes(opening):
    """Backward and forward mode against finite differences in float64, with padding, gate shut and open."""
    q, k, v, mask, k_prefix, v_prefix = (x[:1, :2, :3] if x.dtype == torch.float64 else x for x in _inputs())
    mask = mask[:1, :, :3, 2:]
    gate = torch.full((2,), opening, dtype=torch.float64)
    inputs = [x.detach().requires_grad_() for x in (q, k, v, k_prefix, v_prefix, gate)]

    def attend(q, k, v, k_prefix, v_prefix, gate):
        return gated_prefix_attention(q, k, v, mask, k_prefix, v_prefix, gate, 0.3)

    assert torch.autograd.gradcheck(attend, inputs, check_forward_ad=True)


def test_prefix_equals_a_prefilled_key_value_cache(tiny_llada):
    """With the gate at 1 the soft prompt is what transformers computes from a cache filled with the same keys and values."""
    model = tiny_llada()
    keys, values = torch.randn(2, 2, 2, 3, 4), torch.randn(2, 2, 2, 3, 4)  # layers, B, H_kv, K, d
    ids = torch.randint(3, 11, (2, 6))
    attention_mask = torch.ones(2, 6, dtype=torch.bool)
    ours = model(ids, attention_mask, Prefix(keys, values, torch.ones(2, 4)))
    cache = DynamicCache()
    for layer in range(2):
        cache.update(keys[layer], values[layer], layer)
    hidden = model.model(
        inputs_embeds=model.embed(ids),
        attention_mask=torch.ones(2, 1, 6, 9, dtype=torch.bool),
        position_ids=torch.arange(6).expand(2, 6),
        **cache_argument(cache),
        use_cache=True,
    ).last_hidden_state
    torch.testing.assert_close(ours, model.lm_head(hidden), atol=1e-5, rtol=1e-5)


def test_positions_skip_left_padding():
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_a_document_mask_gives_each_document_what_it_gets_on_its_own():
    q, k, v = (torch.randn(1, 2, 7, 8, dtype=torch.float64) for _ in range(3))
    lengths = [3, 1, 3]
    document_ids = torch.repeat_interleave(torch.tensor([0, 1, 2]), torch.tensor(lengths))[None]
    for causal in (False, True):
        together = bidirectional_attention(q, k, v, document_attention_mask(document_ids, causal=causal), 0.3)
        alone = [
            F.scaled_dot_product_attention(*part, is_causal=causal, scale=0.3)
            for part in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        ]
        torch.testing.assert_close(together, torch.cat(alone, 2))
    everything = document_attention_mask(torch.zeros(1, 7), causal=False)
    assert (bidirectional_attention(q, k, v, everything, 0.3) - together).abs().max() > 1e-2


def test_a_document_mask_by_hand():
    causal = document_attention_mask(torch.tensor([[0, 0, 1]]), causal=True)
    assert causal.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]


def test_visible_attention_is_masked_attention_with_a_gradient_to_what_is_hidden():
    q, k, v = _inputs()[:3]
    seen = (torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5) | torch.eye(5, dtype=torch.bool)
    seen = seen.tril()
    share = seen.to(q.dtype).requires_grad_()
    out = visible_attention(q, k, v, share, 0.3)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3))
    (grad,) = torch.autograd.grad(out.square().sum(), share)
    hidden = ~seen & torch.ones(5, 5, dtype=torch.bool).tril()
    assert grad[hidden].abs().min() > 1e-9
    assert grad.triu(1).abs().max() == 0
    some = torch.rand(2, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    inputs = [x.clone().requires_grad_() for x in (q, k, v, some)]
    assert torch.autograd.gradcheck(lambda *x: visible_attention(*x, 0.3), inputs)
    far = visible_attention(100 * q, 100 * k, v, share, 1.0)
    (finite,) = torch.autograd.grad(far.sum(), share)
    assert far.isfinite().all()
    assert finite.isfinite().all()
