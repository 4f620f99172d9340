"""LoRA-XS: frozen factors of each weight, and a small matrix between them that trains."""

import pytest
import torch

from models.backbones.twin import LoraXsLinear, with_lora_xs


def linear(inputs=6, outputs=4):
    return torch.nn.Linear(inputs, outputs, bias=False)


def random_core(layer):
    with torch.no_grad():
        layer.core.normal_(generator=torch.Generator().manual_seed(0))
    return layer


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_at_full_rank_a_multiple_of_the_identity_scales_the_weight(shape):
    base, x = linear(*shape), torch.randn(3, shape[0])
    layer = LoraXsLinear(base, 9)
    assert layer.core.shape == (4, 4)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        layer.core.copy_(0.5 * torch.eye(4))
    torch.testing.assert_close(layer(x), 1.5 * base(x))


def test_below_full_rank_it_changes_the_largest_parts_of_the_weight_alone():
    base = linear()
    layer = random_core(LoraXsLinear(base, 2))
    u, s, vh = torch.linalg.svd(base.weight.detach(), full_matrices=False)
    change = layer(torch.eye(6)).T - base.weight
    inside = u.T @ change @ vh.T / s.unsqueeze(-1)
    assert inside[2:].abs().max() < 1e-5
    assert inside[:, 2:].abs().max() < 1e-5
    assert inside[:2, :2].abs().min() > 1e-3


def test_signs_that_a_decomposition_may_choose_change_nothing(monkeypatch):
    base, x = linear(), torch.randn(3, 6)
    expected = random_core(LoraXsLinear(base, 3))(x)
    svd = torch.linalg.svd

    def other_signs(weight, full_matrices):
        u, s, vh = svd(weight, full_matrices=full_matrices)
        sign = torch.tensor([-1.0, 1.0, -1.0, -1.0]).to(u.dtype)
        return u * sign, s, vh * sign.unsqueeze(-1)

    monkeypatch.setattr(torch.linalg, "svd", other_signs)
    torch.testing.assert_close(random_core(LoraXsLinear(base, 3))(x), expected)


def test_every_linear_layer_of_the_body_has_one_and_the_head_has_none(tiny_llada):
    base = tiny_llada()
    twin = with_lora_xs(base, 2)
    adapted = [name for name, module in twin.named_modules() if isinstance(module, LoraXsLinear)]
    assert len(adapted) == 7 * base.config.num_hidden_layers
    assert not any("lm_head" in name for name in adapted)
    assert {p.data_ptr() for p in twin.parameters() if not p.requires_grad} == {p.data_ptr() for p in base.parameters()}
