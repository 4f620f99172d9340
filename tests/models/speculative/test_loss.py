"""The loss toward q* against finite differences, known relations, and itself in chunks."""

import pytest
import torch

import models.speculative.loss as qstar_loss
from models.functional.divergence import kl_divergence
from models.speculative.distribution import MixtureDist
from models.speculative.loss import qstar_terms


def pair(positions=5, words=6, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, positions, words, generator=draw, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("loss", ["kl", "acceptance"])
def test_the_loss_and_its_gradient_by_finite_differences(loss):
    """q* is held fixed: differences are taken with q* from the unperturbed logits."""
    theta, target = pair()
    mixture = MixtureDist()
    fixed = mixture(theta.log_softmax(-1), target.log_softmax(-1)).log_q

    def value(logits):
        logp = logits.log_softmax(-1)
        if loss == "kl":
            return (fixed.exp() * (fixed - logp)).sum(-1).mean()
        return (1 - torch.minimum(fixed.exp(), logp.exp()).sum(-1)).mean()

    logits = theta.clone().requires_grad_()
    terms = qstar_terms(logits.log_softmax(-1), target.log_softmax(-1), mixture, loss)
    assert terms.loss.item() == pytest.approx(value(theta).item(), abs=1e-12)
    terms.loss.backward()
    for position, word in [(0, 0), (2, 3), (4, 5)]:
        step = torch.zeros_like(theta)
        step[position, word] = 1e-6
        slope = (value(theta + step) - value(theta - step)) / 2e-6
        assert logits.grad[position, word].item() == pytest.approx(slope.item(), abs=1e-7)


def test_the_figures_of_a_position_satisfy_known_relations():
    theta, target = (part.log_softmax(-1) for part in pair())
    raw = qstar_terms(theta, target, MixtureDist(), "kl").raw
    assert raw["kl_theta"].item() == pytest.approx(raw["chernoff"].item(), abs=1e-5)
    assert raw["kl_target"].item() == pytest.approx(raw["chernoff"].item(), abs=1e-5)
    assert raw["kl_theta_target"].item() == pytest.approx(kl_divergence(theta, target).mean().item(), abs=1e-6)
    assert raw["overlap"] <= min(raw["beta_theta"], raw["beta_target"])
    half = qstar_terms(theta, target, MixtureDist(0.5), "kl").raw
    assert half["alpha"] == 0.5
    assert abs(half["kl_theta"] - half["kl_target"]) > 1e-3  # the negative control: equal weights are not equally far


@pytest.mark.parametrize("loss", ["kl", "acceptance"])
def test_chunks_give_the_loss_the_figures_and_the_gradient_of_all_positions_at_once(loss, monkeypatch):
    """With top-k, so that q* has zeros; the last chunk is shorter."""
    seen = []

    class Recorded(MixtureDist):
        def __call__(self, theta, target):
            seen.append(len(theta))
            return super().__call__(theta, target)

    def terms(mixture):
        logits = pair(positions=11, words=200, dtype=torch.float32)[0].requires_grad_()
        found = qstar_terms(logits.log_softmax(-1), pair(11, 200, torch.float32)[1].log_softmax(-1), mixture, loss)
        found.loss.backward()
        return found.loss, found.raw, logits.grad

    whole = terms(MixtureDist(top_k=50))
    monkeypatch.setattr(qstar_loss, "CHUNK_NUMBERS", 4 * 200)
    chunked = terms(Recorded(top_k=50))
    assert seen == [4, 4, 3, 3, 4, 4]  # forward, then backward from the last chunk to the first
    torch.testing.assert_close(chunked, whole, rtol=0, atol=0)
    assert whole[2].abs().max() > 0
    assert not any(part.requires_grad for part in chunked[1].values())
