"""Codes that nobody learns, by hand; hashes that spread evenly and tell texts apart."""

import math

import torch

from models.functional.fixed_codes import leading_tokens, random_hash, surprising_tokens, unigram_surprisal

TEXT = torch.tensor([[3, 1, 2, 1], [2, 2, 0, 3]])


def test_leading_tokens():
    assert leading_tokens(TEXT, 2).tolist() == [[3, 1], [2, 2]]


def test_surprising_tokens_in_reading_order():
    surprisal = torch.tensor([0.5, 1.0, 2.0, 0.1])
    assert surprising_tokens(TEXT, surprisal, 2).tolist() == [[1, 2], [2, 2]]
    assert surprising_tokens(TEXT, surprisal, 3).tolist() == [[1, 2, 1], [2, 2, 0]]


def test_surprisal_is_that_of_smoothed_shares():
    found = unigram_surprisal(TEXT, 5)
    shares = torch.tensor([2.0, 3.0, 4.0, 3.0, 1.0]) / 13
    torch.testing.assert_close(found, -shares.double().log())


def test_a_hash_is_the_same_for_equal_texts_and_spreads_others_evenly():
    texts = torch.arange(4096).unsqueeze(-1).repeat(1, 6) % torch.tensor([4, 7, 16, 64, 256, 4096])
    codes = random_hash(texts, torch.tensor([8, 3]))
    assert torch.equal(codes, random_hash(texts.clone(), torch.tensor([8, 3])))
    counts = torch.bincount(codes[:, 0], minlength=8)
    assert len(counts) == 8
    chi2 = ((counts - 512) ** 2 / 512).sum()
    assert chi2 < 24.3  # 0.1 % of chi-squared with 7 degrees of freedom
    joint = torch.bincount(codes[:, 0] * 3 + codes[:, 1], minlength=24)
    assert ((joint - 4096 / 24) ** 2 / (4096 / 24)).sum() < 49.7  # places are independent
    assert math.isclose(codes[:, 1].double().mean().item(), 1, abs_tol=0.06)


def test_the_order_of_words_counts():
    a, b = torch.tensor([[1, 2, 3]]), torch.tensor([[3, 2, 1]])
    sizes = torch.full((4,), 1000)
    assert not torch.equal(random_hash(a, sizes), random_hash(b, sizes))
