"""Figures of a decoder against sums by hand."""

from types import SimpleNamespace

import pytest
import torch

from models.speculative.meter import AcceptanceMeter


def output(lengths, accepted=0, verified=0):
    counts = {"accepted": {"theta": accepted, "target": 1}, "verified": {"theta": verified, "target": 1}}
    return SimpleNamespace(tokens=torch.zeros(len(lengths), 9), lengths=torch.tensor(lengths), **counts)


def cost(meter, naive=None):
    return meter.cost(meter.sum_over_ranks(lambda values: values), naive)


def naive_meter():
    """Two batches: 10 tokens in 10 s, 20 tokens in 10 s."""
    meter = AcceptanceMeter()
    for lengths in ([4, 6], [9, 11]):
        meter.add_time(10.0, output(lengths))
        meter.add_drafts(output(lengths), None)
    return meter


def test_a_speed_up_is_a_ratio_of_seconds_per_generated_token():
    """Half the seconds for half the tokens is no gain."""
    meter, naive = AcceptanceMeter(), naive_meter()
    for lengths in ([2, 3], [4, 6]):
        meter.add_time(5.0, output(lengths))
        meter.add_drafts(output(lengths), 1.5)
    found = cost(meter, naive)
    assert found["seconds_per_generated_token"] == pytest.approx(10 / 15)
    assert found["speedup_vs_naive"] == pytest.approx(1.0)
    assert found["speedup_formula"] == 1.5


def test_the_quartiles_are_those_over_batches():
    """1 s and 0.5 s a token for the naive decoder, 0.5 s and 0.125 s here: 2 and 4 times faster."""
    meter, naive = AcceptanceMeter(), naive_meter()
    for seconds, lengths in ((5.0, [5, 5]), (2.0, [8, 8])):
        meter.add_time(seconds, output(lengths))
        meter.add_drafts(output(lengths), 1.5)
    found = cost(meter, naive)
    assert found["speedup_vs_naive"] == pytest.approx((20 / 30) / (7 / 26))
    assert [found[f"speedup_vs_naive_{quartile}"] for quartile in ("q1", "q3")] == [2.5, 3.5]
    assert cost(naive, naive)["speedup_vs_naive"] == 1.0


def test_acceptance_and_the_formula_are_weighted_by_what_was_verified_and_by_texts():
    meter = AcceptanceMeter()
    meter.add_drafts(output([1, 1, 1], accepted=2, verified=9), 2.0)
    meter.add_drafts(output([1], accepted=3, verified=4), 4.0)
    found = cost(meter)
    assert found["acceptance"] == pytest.approx((2 + 1 + 3 + 1) / (9 + 1 + 4 + 1))
    assert found["speedup_formula"] == pytest.approx(2.5)
    assert found["speedup_vs_naive"] is found["speedup_vs_naive_q1"] is None


def test_quality_is_nats_a_token_and_a_plain_decoder_has_no_cost():
    meter = AcceptanceMeter()
    meter.add_texts(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    meter.add_texts(torch.tensor([4.5]), torch.tensor([0.5]))
    meter.exactness = {"g_test_p": 0.3}
    totals = meter.sum_over_ranks(lambda values: values)
    assert meter.quality(totals) == {"nll_theta": 2.5, "nll_target": 2.5, "g_test_p": 0.3}
    assert cost(meter) == {}
