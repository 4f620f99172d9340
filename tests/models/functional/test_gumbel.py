"""One sample for both halves, the gradient of the relaxed choice, and draws from the right distribution."""

import pytest
import torch

from models.functional.commitment import commitment, relaxation_cosine
from models.functional.gumbel import gumbel_noise, gumbel_st, one_hot_argmax, straight_through
from models.functional.usage import code_perplexity, usage_kl


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_both_halves_are_of_one_sample_by_hand():
    logits, noise = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0])
    choice = gumbel_st(logits, 0.5, noise)
    assert choice.hard.tolist() == [1.0, 0.0]  # 2 > 1, although the logits alone prefer the other
    assert choice.soft.tolist() == pytest.approx(torch.tensor([4.0, 2.0]).softmax(-1).tolist())
    assert torch.equal(one_hot_argmax(logits), torch.tensor([0.0, 1.0]))


def test_hard_choices_are_draws_from_the_softmax_at_every_temperature():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    for temperature in (0.3, 2.0):
        rows = logits.expand(20000, -1)
        share = gumbel_st(rows, temperature, gumbel_noise(rows, generator())).hard.mean(0)
        torch.testing.assert_close(share, logits.exp(), atol=0.015, rtol=0)
    without = gumbel_st(rows, 2.0, gumbel_noise(rows, generator()) * 0).hard.mean(0)
    assert without[0] == 1  # the control: no noise, no draw


def test_the_gradient_is_that_of_the_soft_half():
    logits = torch.randn(3, 4, dtype=torch.float64, generator=generator()).requires_grad_()
    noise, table = gumbel_noise(logits, generator(1)), torch.randn(4, 5, dtype=torch.float64, generator=generator(2))

    def soft_embedding(logits):
        return ((logits + noise) / 0.7).softmax(-1) @ table

    choice = gumbel_st(logits, 0.7, noise)
    mixed = straight_through(choice.hard @ table, choice.soft @ table)
    assert torch.equal(mixed, choice.hard @ table)
    goal = torch.randn(3, 5, dtype=torch.float64, generator=generator(3))
    (found,) = torch.autograd.grad((mixed * goal).sum(), logits)
    step = 1e-6
    for row in range(3):
        for k in range(4):
            nudge = torch.zeros_like(logits)
            nudge[row, k] = step
            with torch.no_grad():
                slope = ((soft_embedding(logits + nudge) - soft_embedding(logits - nudge)) * goal).sum() / (2 * step)
            assert found[row, k] == pytest.approx(slope.item(), abs=1e-8)


def test_commitment_by_hand_moves_the_soft_half_alone():
    soft = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    hard = torch.tensor([[0.0, 0.0], [0.0, 2.0]], requires_grad=True)
    loss = commitment(soft, hard)
    assert loss.item() == pytest.approx((1 + 4 + 0 + 4) / 4)
    loss.backward()
    assert soft.grad.tolist() == [[0.5, 1.0], [0.0, -1.0]]
    assert hard.grad is None
    assert commitment(soft[:0], hard[:0]) == 0
    assert relaxation_cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, -1.0]])) == 0.5


def test_usage_is_zero_for_a_uniform_mean_of_sharp_rows_and_ln_v_for_one_code():
    sharp = torch.eye(4)
    assert usage_kl(sharp) == pytest.approx(0, abs=1e-6)
    assert code_perplexity(sharp) == pytest.approx(4)
    one = torch.tensor([[1.0, 0, 0, 0]]).expand(6, -1)
    assert usage_kl(one) == pytest.approx(torch.tensor(4.0).log().item())
    assert code_perplexity(one) == pytest.approx(1)
    halves = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert usage_kl(halves) == pytest.approx(expected.item())
    assert usage_kl(halves, torch.tensor([0.0, 1.0])) == pytest.approx(0, abs=1e-6)


def test_usage_has_the_gradient_of_finite_differences():
    logits = torch.randn(5, 3, dtype=torch.float64, generator=generator()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: usage_kl(x.softmax(-1)), logits)
    (slope,) = torch.autograd.grad(usage_kl(logits.softmax(-1)), logits)
    assert (slope.abs().sum(-1) > 1e-4).all()


def test_a_code_that_nobody_can_choose_leaves_the_usage_finite():
    chances = torch.tensor([[0.5, 0.5, 0.0]], requires_grad=True)
    loss = usage_kl(chances)
    assert loss.item() == pytest.approx(torch.tensor(1.5).log().item())
    loss.backward()
    assert chances.grad.isfinite().all()
