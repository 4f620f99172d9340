"""The forward process and its loss against hand-computed values and an exact expectation."""

import math

import torch

from models.functional.masked_diffusion import (
    antithetic_times,
    mask_probability,
    mask_tokens,
    masked_diffusion_nll,
    random_length,
)


def test_mask_probability_runs_from_eps_to_one():
    p = mask_probability(torch.tensor([0.0, 0.5, 1.0]), eps=0.1)
    torch.testing.assert_close(p, torch.tensor([0.1, 0.55, 1.0]))


def test_antithetic_times_cover_every_part_of_the_interval_once():
    t = antithetic_times(16, torch.Generator().manual_seed(1), torch.device("cpu"))
    assert sorted((t * 16).floor().int().tolist()) == list(range(16))
    independent = torch.rand(16, generator=torch.Generator().manual_seed(1))
    assert sorted((independent * 16).floor().int().tolist()) != list(range(16))


def test_mask_tokens_leaves_the_prompt_clean_and_masks_at_rate_p():
    x0 = torch.randint(3, 9, (4000, 10))
    maskable = torch.zeros_like(x0, dtype=torch.bool)
    maskable[:, 4:] = True
    p = torch.full((4000,), 0.3)
    xt, masked = mask_tokens(x0, maskable, p, 2, torch.Generator().manual_seed(0))
    assert not masked[:, :4].any()
    assert torch.equal(xt == 2, masked)
    assert torch.equal(xt[~masked], x0[~masked])
    rate = masked[:, 4:].double().mean().item()
    assert abs(rate - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 24000)
    assert abs(rate - 0.35) > 4 * math.sqrt(0.3 * 0.7 / 24000)  # the test would see a wrong rate


def test_loss_by_hand():
    """Two masked tokens of probabilities 1/2 and 1/4 in rows with p = 1/2 and 1/4: 2 ln 2 and 4 ln 4."""
    x0 = torch.tensor([[5, 1], [3, 4]])
    masked = torch.tensor([[False, True], [True, False]])
    logits = torch.full((2, 6), -torch.inf)
    logits[0, [1, 2]] = math.log(0.5)
    logits[1, :4] = math.log(0.25)
    nll = masked_diffusion_nll(logits, x0, masked, torch.tensor([0.5, 0.25]))
    expected = torch.tensor([[0.0, 2 * math.log(2)], [4 * math.log(4), 0.0]])
    torch.testing.assert_close(nll, expected)


def test_loss_of_the_exact_posterior_is_the_entropy():
    """For independent tokens the bound is tight: its expectation over t and masks is -log p(x)."""
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    x0 = torch.multinomial(probabilities, 4 * 20000, replacement=True, generator=torch.Generator().manual_seed(0))
    x0 = x0.view(20000, 4)
    generator = torch.Generator().manual_seed(1)
    p = mask_probability(antithetic_times(len(x0), generator, x0.device))
    _, masked = mask_tokens(x0, torch.ones_like(x0, dtype=torch.bool), p, 3, generator)
    logits = probabilities.log().expand(int(masked.sum()), 3)
    bound = masked_diffusion_nll(logits, x0, masked, p).sum(1)
    exact = -probabilities.log()[x0].sum(1)
    error = bound.std() / math.sqrt(len(x0))
    assert abs(bound.mean() - exact.mean()) < 4 * error
    unweighted = masked_diffusion_nll(logits, x0, masked, torch.ones_like(p)).sum(1)
    assert abs(unweighted.mean() - exact.mean()) > 4 * error  # without 1/p it is another number


def test_random_length_cuts_one_batch_in_a_hundred():
    generator = torch.Generator().manual_seed(0)
    lengths = [random_length(50, generator) for _ in range(5000)]
    cut = [n for n in lengths if n < 50]
    assert 20 < len(cut) < 90
    assert min(cut) >= 1
    assert random_length(50, generator, probability=0.0) == 50
