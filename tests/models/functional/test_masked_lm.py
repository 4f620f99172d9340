"""BERT's corruption at its rates, and the any-order bound against the enumeration of all orders."""

import itertools
import math

import pytest
import torch

from models.functional.masked_lm import any_order_weight, bert_corrupt, hide_exactly, stratified_count


def test_corruption_chooses_at_its_rate_and_splits_80_10_10():
    x0 = torch.full((2000, 20), 5)
    maskable = torch.zeros_like(x0, dtype=torch.bool)
    maskable[:, 5:] = True
    xt, chosen = bert_corrupt(x0, maskable, 2, 100, torch.Generator().manual_seed(0))
    n = 2000 * 15
    assert not chosen[:, :5].any()
    assert torch.equal(xt[~chosen], x0[~chosen])

    def near(share, expected, count):
        return abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count)

    assert near(chosen.sum().item() / n, 0.15, n)
    assert not near(chosen.sum().item() / n, 0.18, n)  # the test would see another rate
    picked = xt[chosen]
    random_ids = (picked != 2) & (picked != 5)
    assert near((picked == 2).double().mean().item(), 0.8 + 0.1 / 100, len(picked))
    assert near((picked == 5).double().mean().item(), 0.1 + 0.1 / 100, len(picked))
    assert near(random_ids.double().mean().item(), 0.1 * 0.98, len(picked))


def test_hide_exactly_hides_every_choice_equally_often():
    maskable = torch.tensor([[False, True, True, True, True]]).expand(6000, -1)
    hidden = hide_exactly(maskable, torch.full((6000,), 2), torch.Generator().manual_seed(0))
    assert hidden.sum(-1).eq(2).all()
    assert not hidden[:, 0].any()
    _, counts = torch.unique(hidden, dim=0, return_counts=True)
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 4 * math.sqrt(6000 / 6 * 5 / 6)


def test_counts_of_all_parts_are_every_number_once():
    generator = torch.Generator().manual_seed(0)
    assert [int(stratified_count(torch.tensor([4]), k, 4, generator)) for k in range(4)] == [1, 2, 3, 4]
    drawn = torch.cat([stratified_count(torch.full((4000,), 5), k, 2, generator) for k in range(2)])
    shares = torch.bincount(drawn, minlength=6)[1:].double() / len(drawn)
    assert (shares - 0.2).abs().max() < 4 * math.sqrt(0.2 * 0.8 / len(drawn))


@pytest.mark.parametrize("wrong", [False, True])
def test_the_weighted_cross_entropy_is_the_mean_over_orders(wrong):
    """A model that answers with p = (1 + tokens seen) / 8 at every place: NLL averaged over the 3! orders of filling."""

    def nll(hidden):
        return -math.log((1 + 3 - len(hidden)) / 8)

    by_order = [
        sum(nll(order[k:]) for k in range(3))  # the k-th token is filled while the rest is hidden
        for order in itertools.permutations(range(3))
    ]
    expected = sum(by_order) / 6
    maskable = torch.ones(1, 3, dtype=torch.bool)
    total = 0.0
    for count in (1, 2, 3):
        choices = list(itertools.combinations(range(3), count))
        weight = 1.0 if wrong else float(any_order_weight(maskable, torch.tensor([count])))
        total += sum(weight * count * nll(choice) for choice in choices) / len(choices) / 3
    assert (total == pytest.approx(expected)) != wrong
