"""`Terms`: a mean over tokens, and what a batch weighs beside others."""

import pytest
import torch

from models.interfaces.objective import Terms


@pytest.mark.parametrize(("tokens", "loss"), [(4, 1.5), (0, 0.0)])
def test_a_loss_over_tokens_is_their_mean_and_none_of_no_tokens(tokens, loss):
    terms = Terms.over_tokens(torch.tensor(6.0) * bool(tokens), tokens, torch.zeros(1, 4))
    assert (terms.loss.item(), terms.weight, terms.raw) == (loss, tokens, {})


def test_a_loss_that_counts_no_tokens_weighs_one():
    assert Terms(torch.tensor(2.0), {}).weight == 1
