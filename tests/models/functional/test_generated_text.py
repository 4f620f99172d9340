"""Figures of variety, by hand."""

import math

import pytest
import torch

from models.functional.generated_text import (
    TextNats,
    counted_tokens,
    distinct_ngrams,
    generative_perplexity,
    perplexity_at_entropy,
    text_entropy,
    unigram_entropy,
)
from models.functional.per_token import NORMAL_95

TEXTS = torch.tensor([[1, 1, 2, 2], [1, 2, 3, 4]])


def test_entropy_within_a_text_by_hand():
    # halves: ln 2; four different tokens: ln 4
    assert text_entropy(TEXTS) == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert text_entropy(torch.zeros(3, 5, dtype=torch.long)) == 0


def test_entropy_of_all_tokens_by_hand():
    shares = [3 / 8, 3 / 8, 1 / 8, 1 / 8]
    plug_in = -sum(p * math.log(p) for p in shares)
    assert unigram_entropy(TEXTS) == pytest.approx(plug_in + 3 / 16)  # Miller-Madow: (4 kinds - 1) / (2 * 8 tokens)


def test_texts_that_repeat_each_other_are_told_apart_from_texts_that_repeat_themselves():
    each_its_own = torch.arange(4).unsqueeze(1).expand(4, 6)  # aaaaaa, bbbbbb ...
    all_alike = torch.arange(6).expand(4, 6)  # abcdef, abcdef ...
    assert text_entropy(each_its_own) == 0 < text_entropy(all_alike)
    assert distinct_ngrams(all_alike, 2) == pytest.approx(5 / 20)


def test_distinct_ngrams_by_hand():
    assert distinct_ngrams(TEXTS, 1) == pytest.approx(4 / 8)
    assert distinct_ngrams(TEXTS, 2) == pytest.approx(5 / 6)  # 11 12 22, 12 23 34
    assert distinct_ngrams(TEXTS, 3) == 1.0


def test_what_counts_of_a_text():
    """All but the first token, and of the end tokens (9) only the first."""
    assert counted_tokens([5, 6, 9, 7, 9, 9], 9) == [False, True, True, True, False, False]
    assert counted_tokens([9, 6, 9], 9) == [False, True, False]  # the first one is given
    assert counted_tokens([5, 5], None) == [False, True]
    assert counted_tokens([], 9) == []


def test_perplexity_is_a_mean_over_tokens_not_over_texts():
    """Texts of 3 and 1 tokens with 6 and 4 nats: exp(10 / 4), not exp((2 + 4) / 2)."""
    value, (low, high) = generative_perplexity(TextNats(torch.tensor([6.0, 4.0]), torch.tensor([3, 1])))
    assert value == pytest.approx(math.exp(2.5))
    # residuals 6 - 7.5 and 4 - 2.5; variance 2 / 1 * 4.5 / 16
    assert math.log(high / low) == pytest.approx(2 * NORMAL_95 * math.sqrt(2 * 4.5 / 16))
    assert generative_perplexity(TextNats(torch.tensor([3.0]), torch.tensor([2]))) == (
        pytest.approx(math.exp(1.5)),
        None,
    )
    assert generative_perplexity(TextNats(torch.zeros(2), torch.zeros(2, dtype=torch.long))) is None


def test_perplexity_at_an_entropy_by_hand():
    points = [(3.8, 100.0), (3.4, 25.0), (3.0, 10.0)]
    assert perplexity_at_entropy(points, 3.6) == pytest.approx(50.0)  # the geometric mean of 100 and 25
    assert perplexity_at_entropy(points, 3.1) == pytest.approx(10**0.75 * 25**0.25)
    assert perplexity_at_entropy(points, 3.4) == pytest.approx(25.0)
    assert perplexity_at_entropy(points, 3.9) is None  # nothing is extrapolated
    assert perplexity_at_entropy(points, 2.9) is None
    assert perplexity_at_entropy(points[:1], 3.8) is None
    assert perplexity_at_entropy([(3.0, 10.0), (3.0, 20.0)], 3.0) == pytest.approx(10.0)
