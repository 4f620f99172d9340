"""The mean-flow identity against quadrature, finite differences and its known failures."""

import math

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from models.backbones.frozen_layers import FrozenLinear, FrozenMLP, FrozenRMSNorm, freeze
from models.flow.prefix_student import PrefixStudent
from models.functional.errors import UsageError
from models.functional.flow_times import check_interval, sample_interval
from models.functional.jvp import value_and_jvp
from models.functional.meanflow import (
    clean_embedding,
    expected_embedding,
    flow_loss,
    masking_path_tangent,
    meanflow_target,
)

NODES, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(24))


class AnalyticFlow:
    """One masked position whose exact posterior expects the clean embedding E_x = 0 all along the line z_s = s·m.

    Three tokens with embeddings -1, 0, 1 and symmetric logits (a, 0, a): softmax(v) E = 0 whatever a is, while v itself
    changes along the line. With eps = 0, p(t) = t.
    """

    embedding = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)

    def v(self, z, s):
        a = torch.sin(3 * s) + 0.7 * z * s - z**2
        return torch.stack([a, torch.zeros_like(a), a], -1)

    def u(self, z, r, t):
        """Average of v over [r, t] along the line through the origin and z at time t, by Gauss-Legendre quadrature."""
        s = r + (t - r) * (NODES + 1) / 2  # (24,)
        return (WEIGHTS.unsqueeze(-1) / 2 * self.v(z * s / t, s)).sum(0)


@pytest.mark.parametrize(("tangent", "fits"), [("path", True), ("source", False), ("argmax", False), ("random", False)])
def test_fixed_point_is_the_average_along_the_masking_path(tangent, fits):
    """u_tgt(u) = u for the path average and the path's tangent; other tangents leave a residual of order 1."""
    flow, worst, generator = AnalyticFlow(), 0.0, torch.Generator().manual_seed(0)
    for r, t, z in ((0.1, 0.9, 0.8), (0.0, 1.0, -1.1), (0.5, 0.6, 0.4), (0.3, 0.3, 0.7)):
        r, t, z = (torch.tensor(value, dtype=torch.float64) for value in (r, t, z))
        v = flow.v(z, t)
        clean = clean_embedding(v.unsqueeze(0), flow.embedding, tangent, generator)
        drift = masking_path_tangent(z.view(1, 1), clean, t.view(1), 0.0, tangent).squeeze()
        u, du_dt = value_and_jvp(lambda z, t, r=r: flow.u(z, r, t), (z, t), (drift, torch.ones_like(t)))
        target = meanflow_target(v.unsqueeze(0), du_dt.unsqueeze(0), r.view(1), t.view(1))[0]
        worst = max(worst, (target - u).abs().max().item())
    assert (worst < 1e-9) if fits else (worst > 0.1)


def test_a_drawn_token_has_the_derivative_of_the_path_in_the_mean():
    """du/dt of every token, weighted by its probability, is that along the path; weighted alike (`random`) it is not."""
    flow, (r, t, z) = AnalyticFlow(), torch.tensor([0.1, 0.9, 0.8], dtype=torch.float64)
    v = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)

    def derivative(clean):
        drift = masking_path_tangent(z.view(1, 1), clean, t.view(1), 0.0, "sample").squeeze()
        return value_and_jvp(lambda z, t: flow.u(z, r, t), (z, t), (drift, torch.ones_like(t)))[1]

    each = torch.stack([derivative(token.view(1, 1)) for token in flow.embedding])
    along = derivative(expected_embedding(v, flow.embedding))
    torch.testing.assert_close(v[0].softmax(-1) @ each, along, atol=1e-12, rtol=0)
    assert (each.mean(0) - along).abs().max() > 0.1


def test_tokens_of_tangents_are_drawn_as_their_names_say():
    draw = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.2, 0.3, 0.0]).log().expand(20_000, -1)
    embedding = torch.eye(4)
    frequency = {
        kind: clean_embedding(logits, embedding, kind, draw).mean(0) for kind in ("sample", "argmax", "random")
    }
    torch.testing.assert_close(frequency["sample"], torch.tensor([0.5, 0.2, 0.3, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(frequency["random"], torch.full((4,), 0.25), atol=0.02, rtol=0)
    assert frequency["argmax"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert frequency["sample"][3] == 0
    with pytest.raises(UsageError, match=r"module\.tangent=up is not known"):
        masking_path_tangent(logits, logits, logits[:, 0], 0.0, "up")


def test_the_target_is_a_constant():
    v, du_dt = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    assert not meanflow_target(v, du_dt, torch.zeros(2), torch.ones(2)).requires_grad


def test_jvp_equals_central_differences_through_the_student(tiny_llada):
    """Forward-mode derivative of the student's logits along (embeddings, t), prefix and frozen linears included, float64."""
    student = PrefixStudent(tiny_llada(), prompt_length=3, hidden_size=8, rank=4).double()
    student.soft_prompt.gate.data.fill_(0.7)
    mask = torch.tensor([[False, True, True, True], [True, True, True, True]])
    z = student.base.embed(torch.randint(3, 11, (2, 4)))
    t, r = torch.tensor([0.6, 0.9], dtype=torch.float64), torch.tensor([0.2, 0.9], dtype=torch.float64)
    direction = (torch.randn_like(z), torch.ones_like(t))

    def logits(z, t):
        return student.base.lm_head(student.hidden(z, mask, r, t))[mask]

    value, exact = value_and_jvp(logits, (z, t), direction)
    again, approximate = value_and_jvp(logits, (z, t), direction, backend="finite_difference", step=1e-6)
    torch.testing.assert_close(value, again)
    torch.testing.assert_close(exact, approximate, atol=1e-7, rtol=1e-7)
    _, other = value_and_jvp(logits, (z, t), (direction[0], torch.zeros_like(t)))
    assert (exact - other).abs().max() > 1e-3  # the prefix' own dependence on t is part of the derivative
    value.square().sum().backward()
    assert student.soft_prompt.gate.grad.abs().max() > 0
    assert all(p.grad is None for p in student.base.parameters())


def test_losses_by_hand():
    u = torch.tensor([[0.0, 0.0]])
    target = torch.log(torch.tensor([[0.75, 0.25]]))
    ln2 = float(np.log(2))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert flow_loss(u, target, "ce").item() == pytest.approx(ln2)
    assert flow_loss(u, target, "kl").item() == pytest.approx(ln2 - entropy)
    assert flow_loss(u, target, "hard", torch.tensor([1])).item() == pytest.approx(ln2)
    assert flow_loss(u + torch.tensor([[1.0, 0.0]]), target, "hard").item() == pytest.approx(np.log1p(np.exp(-1)))
    assert flow_loss(u, target, "mse").item() == pytest.approx((np.log(0.75) ** 2 + np.log(0.25) ** 2) / 2)
    with pytest.raises(UsageError, match="type kl, ce, mse or hard"):
        flow_loss(u, target, "huber")


def test_kl_and_ce_have_the_same_gradient_and_ignore_a_constant():
    target = torch.randn(5, 7, dtype=torch.float64)
    gradients = []
    for kind in ("kl", "ce"):
        u = torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7).requires_grad_()
        flow_loss(u, target, kind).sum().backward()
        gradients.append(u.grad)
    torch.testing.assert_close(*gradients)
    assert flow_loss(target + 3.0, target, "kl").abs().max() < 1e-12
    assert flow_loss(target + 3.0, target, "mse").min() > 8.9


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_intervals_are_ordered_with_exact_shares(law):
    generator = torch.Generator().manual_seed(0)
    r, t, n_equal = sample_interval(40, generator, torch.device("cpu"), law=law, equal_share=0.5, endpoint_share=0.25)
    check_interval(r, t)
    assert n_equal == 20
    assert torch.equal(r[:20], t[:20])
    assert r[30:].eq(0).all()
    assert t[30:].eq(1).all()
    assert (r[20:30] < t[20:30]).all()


def test_small_batches_keep_their_shares_on_average():
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(2)
    for _ in range(400):
        r, t, n_equal = sample_interval(1, generator, torch.device("cpu"), equal_share=0.5, endpoint_share=0.25)
        counts += torch.tensor([n_equal, float(r[0] == 0 and t[0] == 1)])
    assert 160 < counts[0] < 240
    assert 20 < counts[1] < 90  # a quarter of the rows that are not equal ones


def test_wrong_intervals_and_shares_are_named():
    with pytest.raises(UsageError, match=r"0 <= r <= t <= 1 is needed; got r=0.8, t=0.5"):
        check_interval(torch.tensor([0.1, 0.8]), torch.tensor([0.2, 0.5]))
    for options in ({"equal_share": 1.5}, {"equal_share": 0.8, "endpoint_share": 0.4}, {"law": "cauchy"}):
        with pytest.raises(UsageError, match=r"module\."):
            sample_interval(4, torch.Generator(), torch.device("cpu"), **options)


def test_forward_ad_and_frozen_layers_give_what_torch_func_jvp_gives_on_ordinary_ones(tiny_llada):
    """Value, derivative and gradient, bit for bit up to rounding, against transformers' own layers."""
    mask = torch.tensor([[False, True, True, True, True], [True] * 5])
    r, t = torch.tensor([0.2, 0.0]), torch.tensor([0.6, 1.0])
    results = []
    weights = tiny_llada().state_dict()
    prompt = None
    for frozen in (True, False):
        student = PrefixStudent(tiny_llada(), prompt_length=3, hidden_size=8, rank=4)
        if not frozen:
            student.base = tiny_llada().requires_grad_(False)
        student.base.load_state_dict(weights)
        prompt = prompt or student.soft_prompt.state_dict()
        student.soft_prompt.load_state_dict(prompt)
        student.soft_prompt.gate.data.fill_(0.6)
        z = student.base.embed(torch.arange(3, 8).expand(2, 5))
        direction = (torch.linspace(-1, 1, z.numel()).view(z.shape), torch.ones(2))

        def logits(z, t, student=student):
            return student.base.lm_head(student.hidden(z, mask, r, t))

        derive = value_and_jvp if frozen else torch.func.jvp
        value, derivative = derive(logits, (z, t), direction)
        value.square().mean().backward()
        gradients = [p.grad for p in student.soft_prompt.parameters()]
        results.append([value.detach(), derivative.detach(), *gradients])
    assert results[0][1].abs().max() > 0.1
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_frozen_layers_keep_the_model(tiny_llada):
    model, ids = tiny_llada(), torch.randint(3, 11, (2, 6))
    before = model(ids)
    torch.testing.assert_close(freeze(model)(ids), before, atol=1e-6, rtol=1e-6)
    frozen = {type(layer) for layer in model.modules()}
    assert {FrozenLinear, FrozenMLP, FrozenRMSNorm} <= frozen
    assert not {torch.nn.Linear, LlamaMLP, LlamaRMSNorm} & frozen
    half = tiny_llada().bfloat16()
    expected = half(ids)
    torch.testing.assert_close(freeze(half)(ids), expected, atol=0.0, rtol=0.0)


def test_the_expected_embedding_is_a_mean_under_each_rows_own_distribution():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [math.log(3.0), 0.0, -torch.inf]])
    embedding = torch.tensor([[4.0, 0.0], [0.0, 8.0], [100.0, 100.0]])
    torch.testing.assert_close(expected_embedding(logits, embedding), torch.tensor([[2.0, 4.0], [3.0, 2.0]]))
