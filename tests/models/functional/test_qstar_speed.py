"""Speed formulas against published optima and against a simulation of the rounds."""

import itertools
import math
import random

import pytest

from models.functional.errors import UsageError
from models.functional.qstar_speed import (
    SPEEDUPS,
    best_block_length,
    best_gamma,
    slowest_row_rounds,
    speedup_alternate,
    speedup_by_position,
    speedup_carry,
    speedup_third_drafter,
)


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.9])
def test_one_token_drafts_of_equal_models(beta):
    assert speedup_alternate(1, beta, 1.0) == pytest.approx(2 / (2 - beta))


@pytest.mark.parametrize(
    ("cost", "published"), [(1.0, [1.43, 1.54, 1.67, 1.82]), (0.1, [1.83, 2.17, 2.71, 3.77])], ids=["1:1", "1:10"]
)
def test_optimal_drafts(cost, published):
    found = [speedup_alternate(best_gamma(beta, cost, longest=40), beta, cost) for beta in (0.6, 0.7, 0.8, 0.9)]
    assert [round(speed, 2) for speed in found] == published


def test_ceilings():
    assert max(speedup_alternate(gamma, 0.999, 1.0) for gamma in range(1, 40)) < 2
    assert 10 < max(speedup_carry(gamma, 0.9999, 0.1) for gamma in range(1, 3000, 50)) < 11
    assert speedup_third_drafter(8, 0.9, 0.02) > 2


@pytest.mark.parametrize("scheme", ["carry", "alternate"])
@pytest.mark.parametrize("position_cost", [0.0, 0.2])
@pytest.mark.parametrize(("gamma", "beta", "cost"), [(1, 0.5, 1.0), (3, 0.7, 0.3), (5, 0.9, 1.0)])
def test_a_simulation_of_the_rounds_takes_as_long(scheme, gamma, beta, cost, position_cost):
    """Count tokens and model time round by round, as the decoder spends them."""
    draw, tokens, time, pending = random.Random(0), 0, 0.0, False
    for _ in range(200_000):
        drafter_runs = gamma
        if (
            pending
        ):  # the drafter's run that verifies the proposal is the first run of its draft only where it is accepted
            tokens += 1
            time += cost * (1 + position_cost)
            if draw.random() >= beta:
                pending = False
                continue
            drafter_runs = gamma - 1
        accepted = 0
        while accepted < gamma and draw.random() < beta:
            accepted += 1
        time += drafter_runs * cost + 1 + gamma * position_cost
        tokens += accepted + (accepted < gamma)
        pending = False
        if accepted == gamma:
            if scheme == "carry":
                tokens += 1
                time += cost
            else:
                pending = True
    formula = SPEEDUPS[scheme](gamma, beta, cost, position_cost)
    measured = tokens * (1 + cost) / time
    assert measured == pytest.approx(formula, rel=0.01)


@pytest.mark.parametrize("scheme", SPEEDUPS)
def test_drafts_are_as_long_as_they_pay(scheme):
    """Shorter where further positions cost time, none where they cost as much as passes of their own."""
    lengths = [best_gamma(0.8, 0.1, scheme, position_cost=position_cost) for position_cost in (0.0, 0.1, 0.3, 1.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[2] > 0 == lengths[3]
    assert best_gamma(0.0, 0.1, scheme) == 0


@pytest.mark.parametrize(("gamma", "beta", "tokens", "batch"), [(3, 0.7, 30, 8), (6, 0.9, 64, 32), (1, 0.0, 5, 4)])
def test_a_batch_waits_for_its_slowest_row(gamma, beta, tokens, batch):
    draw = random.Random(0)

    def rounds():
        made = count = 0
        while made < tokens:
            accepted = 0
            while accepted < gamma and draw.random() < beta:
                accepted += 1
            made, count = made + accepted + 1, count + 1
        return count

    batches = [[rounds() for _ in range(batch)] for _ in range(4000)]
    ratio = sum(map(max, batches)) * batch / sum(map(sum, batches))
    assert slowest_row_rounds(gamma, beta, tokens, batch) == pytest.approx(ratio, rel=0.01)
    assert slowest_row_rounds(gamma, beta, tokens, 1) == pytest.approx(1)


def test_unknown_schemes_are_named():
    with pytest.raises(UsageError, match="draft=both"):
        best_gamma(0.5, 1.0, "both")


def test_block_speed_up_is_the_expectation_over_all_outcomes():
    """Every outcome of the acceptances of a draft of three, with its probability and tokens, over the time of the round."""
    rates, cost, w = [0.9, 0.4, 0.7], 0.3, 0.05
    for k in (1, 2, 3):
        tokens = 0.0
        for outcome in itertools.product((True, False), repeat=k):
            probability = math.prod(r if yes else 1 - r for r, yes in zip(rates, outcome, strict=False))
            accepted = next((n for n, yes in enumerate(outcome) if not yes), k)
            tokens += probability * (accepted + 1)
        assert speedup_by_position(rates[:k], cost, w) == pytest.approx(tokens / (1 + cost + k * w))
    same = SPEEDUPS["block_drafter"](3, 0.6, cost, w)
    assert speedup_by_position([0.6] * 3, cost, w) == pytest.approx(same)  # one rate for all positions


@pytest.mark.parametrize(
    ("rates", "cost", "w", "best"),
    [
        ([0.9, 0.9, 0.9], 0.1, 0.0, 3),  # positions are free
        ([0.9, 0.1, 0.9], 0.1, 0.2, 1),  # what a token after an unlikely one would add is not worth its position
        ([0.9, 0.1, 0.9], 0.1, 0.05, 2),
        ([0.5, 0.9, 0.9], 1.0, 0.01, 3),  # a pass that pays only for a long draft
        ([0.5, 0.5, 0.5], 2.0, 0.0, 0),  # and one that never does
        ([], 0.1, 0.0, 0),
    ],
)
def test_best_block_length_is_that_of_all_lengths_enumerated(rates, cost, w, best):
    speeds = {0: 1.0} | {k: speedup_by_position(rates[:k], cost, w) for k in range(1, len(rates) + 1)}
    assert best_block_length(rates, cost, w) == max(speeds, key=speeds.get) == best


def test_where_positions_are_free_a_block_is_drafted_whole_or_not_at_all():
    draw = random.Random(0)
    drawn = [[draw.random() for _ in range(6)] for _ in range(500)]
    for w, lengths in ((0.0, {0, 6}), (0.1, set(range(7)))):
        assert {best_block_length(rates, 0.3, w) for rates in drawn} == lengths
