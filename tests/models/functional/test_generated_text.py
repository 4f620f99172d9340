"""Figures of variety, by hand."""

import math

import pytest
import torch

from models.functional.generated_text import distinct_ngrams, text_entropy, unigram_entropy

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
