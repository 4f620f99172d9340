"""Statistics of texts against counts by hand."""

import math

import pytest
import torch

from models.functional.monitor import distinct_share, noise_information

ONE, TWO = torch.zeros(4, 3, dtype=torch.long), torch.tensor([[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]])


def test_ignored_noise_has_no_information_and_used_noise_has_the_entropy_of_its_texts():
    assert noise_information(torch.stack([ONE, ONE + 1])) == pytest.approx(0.0)  # prompts differ, noises do not matter
    assert noise_information(torch.stack([ONE, TWO])) == pytest.approx((0 + math.log(2) + 1 / 8) / 2)


def test_distinct_texts_are_counted_at_each_prompt():
    assert distinct_share(torch.stack([ONE, TWO])) == pytest.approx((1 / 4 + 2 / 4) / 2)
