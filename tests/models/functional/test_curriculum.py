"""Which texts count when, by hand."""

import torch

from models.functional.curriculum import length_limit, mean_of_short, text_lengths


def test_lengths_end_where_the_text_does():
    text = torch.tensor([[5, 6, 1, 1], [5, 1, 6, 1], [5, 6, 7, 8], [1, 1, 1, 1]])
    assert text_lengths(text, end=1).tolist() == [2, 3, 4, 0]


def test_the_limit_grows_from_a_quarter_to_all():
    assert [length_limit(p, 0.5, 16) for p in (0.0, 0.25, 0.5, 0.9)] == [4.0, 10.0, 16, 16]
    assert length_limit(0.0, 0.0, 16) == 16


def test_only_short_texts_count_and_the_shortest_where_none_is_short():
    values, lengths = torch.tensor([1.0, 3.0, 100.0]), torch.tensor([2, 4, 9])
    assert mean_of_short(values, lengths, 4.0) == 2.0
    assert mean_of_short(values, lengths, 9.0) == values.mean()
    assert mean_of_short(values, lengths, 1.0) == 1.0
    values.requires_grad_()
    mean_of_short(values, lengths, 4.0).backward()
    assert values.grad.tolist() == [0.5, 0.5, 0.0]
