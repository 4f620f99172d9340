"""The figures of a router by hand."""

import torch
from torch.testing import assert_close

from models.online.router import LEAST_SPREAD, Router, Routing


def test_the_share_of_commits_is_one_of_valid_positions():
    valid = torch.tensor([[False, True, True, True, True]])
    commit = torch.tensor([[False, True, False, False, False]])
    nothing = torch.zeros(3)
    assert Routing(commit, commit.float(), valid, nothing, 1.0).realised == 0.25
    assert Routing(commit & False, commit.float(), valid & False, nothing, 1.0).realised == 0


def test_the_spread_of_scores_is_their_standard_deviation_and_never_0():
    scores = 3 + 2 * torch.randn(50, dtype=torch.float64)
    for own, expected in ((scores, scores.std(correction=0)), (torch.ones(5).double(), torch.tensor(LEAST_SPREAD))):
        moments = torch.stack([torch.tensor(float(len(own))).double(), own.sum(), own.square().sum()])
        assert_close(Router.spread(None, moments), expected.double())
