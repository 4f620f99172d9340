"""Figures of positions that are worked out in parts are those of all positions at once."""

import pytest
import torch

from models.functional import divergence
from models.functional.divergence import by_positions
from models.functional.meanflow import flow_loss
from models.functional.noisy_mask import distribution_divergence

WORDS = 50
LOSSES = {
    "noisy_mask": lambda target, logits: distribution_divergence(target.softmax(-1), logits),
    "kl": lambda target, logits: flow_loss(logits, target, "kl"),
    "ce": lambda target, logits: flow_loss(logits, target, "ce"),
}


@pytest.mark.parametrize("shape", [(11,), (3, 4), (1, 2, 5), (0,)])
@pytest.mark.parametrize("name", LOSSES)
def test_parts_have_the_values_and_the_gradient_of_the_whole(name, shape, monkeypatch):
    """The last part is shorter. Its positions weigh differently, so that none may be lost or exchanged."""
    target, weight = torch.randn(*shape, WORDS), torch.rand(*shape)

    def loss_and_gradient():
        logits = torch.randn(*shape, WORDS, generator=torch.Generator().manual_seed(1)).requires_grad_()
        found = LOSSES[name](target, logits)
        (found * weight).sum().backward()
        return found.detach(), logits.grad

    whole = loss_and_gradient()
    assert whole[0].shape == shape
    monkeypatch.setattr(divergence, "CHUNK_NUMBERS", 4 * WORDS)
    torch.testing.assert_close(loss_and_gradient(), whole, rtol=0, atol=0)


def test_no_part_is_larger_than_asked_and_nothing_of_it_is_kept(monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK_NUMBERS", 4 * WORDS + 1)
    rows, kept = [], []

    def value(x):
        rows.append(len(x))
        return x.exp().sum(-1)

    x = torch.randn(2, 5, WORDS, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        found = by_positions(value, x)
    assert rows == [4, 4, 2]
    assert all(saved.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for saved in kept)
    found.sum().backward()
    assert sorted(rows) == [2, 2, 4, 4, 4, 4]
    torch.testing.assert_close(x.grad, x.detach().exp())
