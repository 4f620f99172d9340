"""Score, repeats, margin, staleness and the interval of searches, by hand."""

import math

import torch

from models.functional.plan_search import margin, next_interval, plan_score, repeats, staleness


def test_score_by_hand():
    text, plan = torch.tensor([-2.0, -3.0]), torch.tensor([-4.0, -1.0])
    assert plan_score(text, plan, 1.0).tolist() == [-6.0, -4.0]
    assert plan_score(text, plan, 0.0).tolist() == [-2.0, -3.0]
    assert plan_score(text, plan, 0.25).tolist() == [-3.0, -3.25]


def test_repeats_by_hand():
    plans = torch.tensor([[[1, 2], [1, 3], [1, 2], [1, 3]], [[0, 0], [0, 1], [1, 0], [1, 1]]])
    assert repeats(plans).tolist() == [[False, False, True, True], [False] * 4]


def test_margin_by_hand():
    assert margin(torch.tensor([[-3.0, -1.0, -1.5], [-2.0, -2.0, -9.0]])).tolist() == [0.5, 0.0]
    assert margin(torch.tensor([[-3.0, -math.inf]])).tolist() == [math.inf]
    assert margin(torch.tensor([[-3.0]])).tolist() == [math.inf]


def test_staleness_and_what_follows_from_it():
    assert staleness(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])).tolist() == [0.5, 0.0]
    assert next_interval(100, 0.6, 0.5, 10, 1000) == 50  # stale: sooner
    assert next_interval(100, 0.3, 0.5, 10, 1000) == 100  # as it should be
    assert next_interval(100, 0.1, 0.5, 10, 1000) == 150  # fresh: later
    assert next_interval(15, 9.0, 0.5, 10, 1000) == 10
    assert next_interval(900, 0.0, 0.5, 10, 1000) == 1000
