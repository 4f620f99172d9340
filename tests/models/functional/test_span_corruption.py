"""Spans of the right number and length everywhere, and the question and answer of a text by hand."""

import torch

from models.functional.span_corruption import input_and_target, random_spans, span_counts


def test_counts_keep_a_token_before_every_span():
    assert span_counts(20, 0.15, 3.0) == (3, 1)
    assert span_counts(16, 0.5, 3.0) == (8, 3)
    assert span_counts(2, 0.9, 1.0) == (1, 1)
    assert span_counts(10, 0.9, 1.0) == (9, 1)


def test_spans_have_their_counts_and_every_placing_is_as_likely():
    cut = random_spans(4000, 6, 3, 2, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert cut.sum(-1).eq(3).all()
    assert not cut[:, 0].any()
    begins = cut[:, 1:] & ~cut[:, :-1]
    assert begins.sum(-1).eq(2).all()
    placings, counts = torch.unique(cut, dim=0, return_counts=True)
    # kept 3 in 2 parts and cut 3 in 2 parts: 2 x 2 ways
    assert len(placings) == 4
    assert (counts - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5


def test_input_and_target_by_hand():
    x0 = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
    cut = torch.tensor([[False, True, False, True, True], [False, True, True, False, True]])
    question, answer = input_and_target(x0, cut, 2)
    assert question.tolist() == [[10, 2, 12, 2], [20, 2, 23, 2]]
    assert answer.tolist() == [[2, 11, 2, 13, 14], [2, 21, 22, 2, 24]]
