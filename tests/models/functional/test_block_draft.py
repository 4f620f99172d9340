"""Losses of drafts and what survives of them, against enumeration and finite differences; noise that draws tokens."""

import itertools

import pytest
import torch

from models.functional.block_draft import (
    NOISE_BITS,
    draft_loss,
    draw_with_noise,
    expected_survival,
    noise_bits,
    noise_that_draws,
    position_weights,
    total_variation,
)
from models.functional.qstar import overlap


def random_logp(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).log_softmax(-1)


def test_total_variation_is_one_minus_the_overlap():
    p, q = random_logp(5, 7), random_logp(5, 7, seed=1)
    torch.testing.assert_close(total_variation(p, q), 1 - overlap(p, q), atol=1e-14, rtol=0)
    assert total_variation(p, p).abs().max() == 0
    one, other = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    assert total_variation(one, other) == 1


def test_weights_fall_by_e_over_the_decay():
    weights = position_weights(9, 4.0)
    assert weights[0] == 1
    assert weights[4].item() == pytest.approx(weights[0].item() / torch.e)
    assert weights[8].item() == pytest.approx(weights[4].item() / torch.e)


def test_the_loss_by_hand():
    """Two drafts of two tokens, of which one ends after its first."""
    logp, log_q = random_logp(2, 2, 3), random_logp(2, 2, 3, seed=1)
    tokens, counts = torch.tensor([[0, 2], [1, 0]]), torch.tensor([[True, True], [True, False]])
    w = torch.exp(torch.tensor([0.0, -0.5]).double())
    ce = -(logp[0, 0, 0] + w[1] * logp[0, 1, 2] + logp[1, 0, 1]) / (2 + w[1])
    tv = [0.5 * (logp[n, k].exp() - log_q[n, k].exp()).abs().sum() for n, k in ((0, 0), (0, 1), (1, 0))]
    tv = (tv[0] + w[1] * tv[1] + tv[2]) / (2 + w[1])
    found = draft_loss(logp, log_q, tokens, counts, ce=0.3, tv=0.6, decay=2.0)
    torch.testing.assert_close(found.ce, ce)
    torch.testing.assert_close(found.tv, tv)
    torch.testing.assert_close(found.loss, 0.3 * ce + 0.6 * tv)
    assert draft_loss(logp, log_q, tokens, torch.zeros_like(counts)).loss == 0  # no position counts


def test_its_gradient_is_that_of_finite_differences_and_stays_finite_where_the_target_forbids_tokens():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_q = random_logp(2, 3, 4, seed=1)
    log_q = log_q.masked_fill(torch.arange(4) == 3, -torch.inf).log_softmax(-1)
    tokens = torch.randint(0, 3, (2, 3), generator=torch.Generator().manual_seed(2))
    counts = torch.tensor([[True, True, False], [True, True, True]])
    assert torch.autograd.gradcheck(
        lambda x: draft_loss(x.log_softmax(-1), log_q, tokens, counts, decay=3.0).loss, logits
    )
    draft_loss(logits.log_softmax(-1), log_q, tokens, counts).loss.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2].abs().max() == 0  # a position that does not count


def test_expected_survival_is_what_token_verification_accepts():
    """E over texts of the target, against the sum over drafts of Π ψ min(1, q/ψ) = Π min(ψ, q)."""
    words, k = 3, 3
    q = {  # both distributions depend on the tokens before
        prefix: random_logp(words, seed=hash(prefix) % 1000)
        for n in range(k)
        for prefix in itertools.product(range(words), repeat=n)
    }
    p = {prefix: random_logp(words, seed=5000 + hash(prefix) % 1000) for prefix in q}
    accepted, reached = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    for text in itertools.product(range(words), repeat=k):
        logp, log_q = (torch.stack([table[text[:n]] for n in range(k)]).unsqueeze(0) for table in (p, q))
        tokens = torch.tensor([text])
        weight = log_q[0].gather(-1, tokens.T).sum().exp()
        found = expected_survival(logp, log_q, tokens, torch.ones_like(tokens, dtype=torch.bool))
        accepted, reached = accepted + weight * found.accepted, reached + weight * found.reached
    for n in range(1, k + 1):
        wanted = 0.0
        for draft in itertools.product(range(words), repeat=n):
            steps = [torch.minimum(p[draft[:i]][draft[i]].exp(), q[draft[:i]][draft[i]].exp()) for i in range(n)]
            wanted += torch.stack(steps).prod().item()
        assert accepted[n - 1].item() == pytest.approx(wanted, abs=1e-13)
    torch.testing.assert_close(reached[1:], accepted[:-1])
    assert reached[0].item() == pytest.approx(1.0)


def test_positions_behind_the_end_do_not_count():
    logp, log_q = random_logp(1, 3, 4), random_logp(1, 3, 4, seed=1)
    counts = torch.tensor([[True, True, False]])
    found = expected_survival(logp, log_q, torch.zeros(1, 3).long(), counts)
    assert found.accepted[2] == found.reached[2] == 0
    assert found.accepted[1] > 0


def test_tokens_that_top_k_has_cut_end_a_draft_and_poison_nothing():
    """Cut from both, from the target alone, and from the draft alone."""
    cut, kept = -torch.inf, torch.tensor(0.5).double().log().item()
    tokens, counts = torch.zeros(4, 2).long(), torch.tensor([[True, True]] * 3 + [[True, False]])
    pairs = [
        ([kept, cut], [kept, cut]),
        ([kept, kept], [kept, cut]),
        ([kept, cut], [kept, kept]),
        ([kept, cut], [kept, cut]),
    ]
    logp, log_q = (torch.zeros(4, 2, 2).double() for _ in range(2))
    for row, (own, wanted) in enumerate(pairs):
        logp[row, :, 0], log_q[row, :, 0] = torch.tensor(own).double(), torch.tensor(wanted).double()
    found = expected_survival(logp, log_q, tokens, counts)
    torch.testing.assert_close(found.reached, torch.tensor([4.0, 3.0]).double())
    torch.testing.assert_close(found.accepted, torch.tensor([4.0, 0.0]).double())


def test_a_grid_of_noise_draws_multiples_of_its_step_exactly():
    p = torch.tensor([0.25, 0.0, 0.5, 0.25]).double()
    noise = (torch.arange(4).double() + 0.5) / 4
    tokens = draw_with_noise(p.log().expand(4, -1), noise)
    assert torch.bincount(tokens, minlength=4).div(4).tolist() == p.tolist()
    assert tokens[:2].tolist() == [2, 2]  # the most probable token has the lowest noise
    edges = torch.tensor([0.0, 0.5, 0.75]).double()  # an interval holds its lower end
    assert draw_with_noise(p.log().expand(3, -1), edges).tolist() == [2, 0, 3]


def test_a_sum_of_probabilities_below_one_never_draws_an_impossible_token():
    logp = torch.tensor([0.3, 0.3, 0.0, 0.3]).log()  # sums to .9
    assert draw_with_noise(logp.unsqueeze(0), torch.tensor([0.99])).item() == 3


def test_noise_that_draws_a_token_draws_it_again_and_is_uniform():
    draw = torch.Generator().manual_seed(0)
    logp = random_logp(6).expand(40_000, -1)
    tokens = torch.multinomial(logp.exp(), 1, generator=draw).squeeze(-1)
    noise = noise_that_draws(logp, tokens, torch.rand(40_000, generator=draw, dtype=torch.float64))
    assert torch.equal(draw_with_noise(logp, noise), tokens)
    ordered = noise.sort().values
    apart = (ordered - torch.arange(40_000) / 40_000).abs().max()  # Kolmogorov-Smirnov
    assert apart < 1.95 / 200
    other = noise_that_draws(logp, tokens.flip(0), torch.rand(40_000, generator=draw, dtype=torch.float64))
    assert not torch.equal(draw_with_noise(logp, other), tokens)  # the control
    least = noise_that_draws(logp, tokens, torch.zeros(40_000).double())
    assert (least >= 0).all()
    assert (noise < 1).all()


def test_bits_are_the_binary_digits():
    bits = noise_bits(torch.tensor([[0.0, 0.5, 0.75 + 2.0**-NOISE_BITS]]))
    assert bits.shape == (1, 3, NOISE_BITS)
    assert bits[0, 0].tolist() == [-1.0] * NOISE_BITS
    assert bits[0, 1].tolist() == [1.0] + [-1.0] * (NOISE_BITS - 1)
    assert bits[0, 2].tolist() == [1.0, 1.0] + [-1.0] * (NOISE_BITS - 3) + [1.0]
