"""Sums by hand, and sums over ragged parts against the whole."""

import math

import pytest
import torch

from models.functional.bits_per_byte import bits_per_byte, nats_per_token, nll_sums, perplexity, token_nll


def test_by_hand():
    # <bos> costs 3 nats and stands for nothing; "é" (2 bytes) costs ln 8 and "a" (1 byte) ln 2: 3 + 1 bits for 3 bytes
    nll = torch.tensor([[3.0, math.log(8)], [math.log(2), 0.0]])
    sums = nll_sums(nll, torch.tensor([[0, 2], [1, 0]]))
    assert sums.tokens == 4
    assert bits_per_byte(sums).item() == pytest.approx(4 / 3, rel=1e-6)
    assert nats_per_token(sums).item() == pytest.approx((3 + math.log(16)) / 4, rel=1e-6)
    assert perplexity(sums).item() == pytest.approx(math.exp(3 / 4) * 2, rel=1e-6)


def test_a_uniform_model_of_bytes_has_eight_bits_per_byte_and_its_vocabulary_as_perplexity():
    logits, labels = torch.zeros(3, 5, 256), torch.randint(256, (3, 5))
    sums = nll_sums(token_nll(logits, labels), torch.ones(3, 5, dtype=torch.long))
    assert bits_per_byte(sums).item() == pytest.approx(8, rel=1e-6)
    assert perplexity(sums).item() == pytest.approx(256, rel=1e-5)


def test_nll_is_minus_the_log_of_the_softmax():
    logits, labels = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    probability = logits.softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(token_nll(logits, labels), -probability.log())
    assert token_nll(logits.bfloat16(), labels).dtype == torch.float32


def test_ragged_parts_add_up_to_the_whole_and_their_means_do_not():
    nll, sizes = torch.rand(8, 6), torch.randint(0, 4, (8, 6))
    parts = [nll_sums(nll[a:b, :c], sizes[a:b, :c]) for a, b, c in ((0, 1, 6), (1, 4, 6), (4, 8, 6))]
    whole, added = nll_sums(nll, sizes), parts[0].plus(parts[1]).plus(parts[2])
    for mine, theirs in zip(whole, added, strict=True):
        torch.testing.assert_close(mine, theirs)
    mean_of_means = sum(nats_per_token(part) for part in parts) / 3
    assert abs(mean_of_means - nats_per_token(whole)) > 1e-3


def test_a_mean_loss_and_token_weighted_micro_batches_have_one_gradient():
    weight = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    inputs, labels = torch.randn(7, 5, 4, dtype=torch.float64), torch.randint(11, (7, 5))

    def gradient(*losses):
        return torch.autograd.grad(sum(losses), weight)[0]

    def nats(rows):
        return token_nll(inputs[rows] @ weight, labels[rows])

    parts = [slice(0, 2), slice(2, 3), slice(3, 7)]
    whole = gradient(nats(slice(0, 7)).mean())
    weighted = gradient(*(nats(part).sum() / labels.numel() for part in parts))
    torch.testing.assert_close(weighted, whole, rtol=1e-5, atol=1e-7)
    unweighted = gradient(*(nats(part).mean() / len(parts) for part in parts))
    assert (unweighted - whole).abs().max() > 1e-3
