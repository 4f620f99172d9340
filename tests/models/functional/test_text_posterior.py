"""The share of each text behind a noisy point, and targets that are averaged over it: exact by enumeration."""

from itertools import product

import pytest
import torch

from models.functional.noisy_mask import token_evidence
from models.functional.text_posterior import same_prompt, text_evidence, text_posterior, token_posterior

SIGMA = 1.3
PRIOR = torch.tensor([0.5, 0.3, 0.2]).double()
TEXTS = torch.tensor([[0, 1, 2], [3, 1, 0], [3, 2, 2]])


@pytest.fixture
def embedding():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()


def points(embedding, own, s):
    """z_s of texts (B, L) and what lies apart from the mask, whose embedding is the last one."""
    noise = torch.randn(*own.shape, 4, generator=torch.Generator().manual_seed(2)).double()
    mask = embedding[-1]
    z = (1 - s)[:, None, None] * (mask + SIGMA * noise) + s[:, None, None] * embedding[own]
    return z, z - mask


def exact(embedding, z, s):
    """p(text | z_s) of the three texts, from the evidence of each token, (B, 3)."""
    evidence = token_evidence(z, embedding[-1], embedding, s[:, None].expand(z.shape[:2]), SIGMA)
    of_text = evidence[:, torch.arange(3), TEXTS].sum(-1)  # (B, 3 texts)
    return (PRIOR.log() + of_text).softmax(-1)


def shares(embedding, apart, s, texts):
    masked = torch.ones(len(apart), 3, dtype=torch.bool)
    clean = embedding[texts] - embedding[-1]
    return text_posterior(text_evidence(apart, masked, clean, s, SIGMA), torch.ones(len(apart), len(texts)).bool())


@pytest.mark.parametrize("time", [0.0, 0.3, 0.6, 0.9])
def test_with_every_text_as_often_as_it_occurs_it_is_bayes_rule(embedding, time):
    s = torch.full((4,), time).double()
    z, apart = points(embedding, TEXTS[[0, 1, 2, 1]], s)
    often = TEXTS[[0] * 5 + [1] * 3 + [2] * 2]
    w = shares(embedding, apart, s, often)
    by_text = torch.stack([w[:, :5].sum(1), w[:, 5:8].sum(1), w[:, 8:].sum(1)], 1)
    torch.testing.assert_close(by_text, exact(embedding, z, s))


def averaged_target(embedding, apart, s, n, own_law):
    """Mean over the row's own text, from own_law (B, 3), and n - 1 texts from the prior, of the target: (B, 3)."""
    mean = torch.zeros(len(apart), 3).double()
    for drawn in product(range(3), repeat=n):
        w = shares(embedding, apart, s, TEXTS[list(drawn)])
        target = torch.zeros(len(apart), 3).double()
        for k, text in enumerate(drawn):
            target[:, text] += w[:, k]
        mean += own_law[:, drawn[0]].unsqueeze(1) * PRIOR[list(drawn[1:])].prod() * target
    return mean


@pytest.mark.parametrize("n", [1, 2, 4])
def test_targets_averaged_over_any_number_of_texts_have_the_denoiser_as_their_mean(embedding, n):
    s = torch.tensor([0.1, 0.4, 0.7]).double()
    z, apart = points(embedding, TEXTS, s)
    truth = exact(embedding, z, s)
    torch.testing.assert_close(averaged_target(embedding, apart, s, n, truth), truth)
    # control: without the text that the point was made from the mean is another one
    strangers = averaged_target(embedding, apart, s, n, PRIOR.expand(3, 3))
    assert (strangers - truth).abs().max() > 0.02


def test_more_texts_leave_less_variance_where_the_point_says_little(embedding):
    """Squared distance of the target from the truth, over own texts and others drawn together."""
    s = torch.full((1,), 0.1).double()
    z, apart = points(embedding, TEXTS[:1], s)
    truth, spread = exact(embedding, z, s), []
    for n in (1, 2, 4):
        total = 0.0
        for drawn in product(range(3), repeat=n):
            w = shares(embedding, apart, s, TEXTS[list(drawn)])
            target = torch.zeros(1, 3).double().index_add(1, torch.tensor(drawn), w)
            rng = truth[0, drawn[0]] * PRIOR[list(drawn[1:])].prod()
            total += rng.item() * (target - truth).square().sum().item()
        spread.append(total)
    assert spread[1] < 0.6 * spread[0]
    assert spread[2] < 0.6 * spread[1]


def test_a_text_of_another_prompt_has_no_share(embedding):
    given = torch.tensor([[4, 0, 1], [3, 0, 1]])
    masked = torch.tensor([[False, True, True], [False, True, True]])
    texts = torch.tensor([[4, 0, 1], [3, 0, 1], [4, 2, 2]])
    alike = same_prompt(given, masked, texts)
    assert alike.tolist() == [[True, False, True], [False, True, False]]
    s = torch.tensor([0.5, 0.5]).double()
    _, apart = points(embedding, given, s)
    w = text_posterior(text_evidence(apart, masked, embedding[texts] - embedding[-1], s, SIGMA), alike)
    assert w[0, 1] == 0
    assert w[1].tolist() == [0, 1, 0]
    # points at positions that are given do not count
    apart[:, 0] += 10
    again = text_posterior(text_evidence(apart, masked, embedding[texts] - embedding[-1], s, SIGMA), alike)
    torch.testing.assert_close(again, w, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time", [0.9999, 1.0])
def test_far_from_the_texts_and_at_the_end_it_stays_finite(embedding, time, dtype):
    s = torch.tensor([time]).double()
    _, apart = points(embedding, TEXTS[:1], s)
    w = shares(embedding.to(dtype), apart.to(dtype) * 50, s, TEXTS)
    assert w.isfinite().all()
    torch.testing.assert_close(w.double().sum(), torch.tensor(1.0).double())


def test_what_texts_say_at_masked_places_is_the_sum_of_their_shares():
    shares = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]]).double()
    masked = torch.tensor([[True, False, True], [False, True, True]])
    posterior = token_posterior(shares, TEXTS, masked, 5)
    expected = torch.zeros(4, 5).double()
    expected[0, 0], expected[0, 3] = 0.2, 0.8  # the first row's first position
    expected[1, 2], expected[1, 0] = 0.5, 0.5  # its last
    expected[2, 2] = expected[3, 2] = 1  # of the second row the last two
    torch.testing.assert_close(posterior, expected)


def test_single_precision_tells_the_same_shares_as_double(embedding):
    for time in (0.0, 0.3, 0.9, 0.99):
        s = torch.full((3,), time).double()
        _, apart = points(embedding, TEXTS, s)
        single = shares(embedding.float(), apart.float(), s.float(), TEXTS)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), shares(embedding, apart, s, TEXTS), rtol=0, atol=1e-5)
