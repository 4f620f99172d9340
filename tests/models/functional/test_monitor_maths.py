"""What monitors compute, by hand and against truth: wrong conditions, means per token with intervals, certainty."""

import math

import pytest
import torch

from models.functional.certainty import certainty
from models.functional.exchange import derangement, nearest_other
from models.functional.per_token import by_position, per_token


@pytest.mark.parametrize("n", [2, 3, 17])
def test_a_derangement_uses_each_condition_once_and_never_its_own(n):
    for seed in range(20):
        other = derangement(n, torch.Generator().manual_seed(seed))
        assert sorted(other.tolist()) == list(range(n))
        assert (other != torch.arange(n)).all()


def test_derangements_differ():
    found = {tuple(derangement(5, torch.Generator().manual_seed(seed)).tolist()) for seed in range(50)}
    assert len(found) > 10
    assert derangement(1, torch.Generator()).tolist() == [0]


def test_the_nearest_other_is_not_an_equal_one():
    points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    assert nearest_other(points).tolist() == [2, 2, 3, 2]
    assert nearest_other(torch.ones(3, 2)).tolist() == [0, 1, 2]


def test_a_mean_per_token_weighs_tokens_not_texts():
    values, counts = torch.tensor([[1.0, 1.0, 1.0], [5.0, 9.0, 9.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    found = per_token(values, counts)
    assert found.mean == pytest.approx(2.0)
    # residuals 3 - 6 and 5 - 2, N / (N - 1) = 2, 4 tokens
    assert found.half == pytest.approx(1.959964 * math.sqrt(2 * (9 + 9)) / 4, rel=1e-5)
    assert per_token(values, torch.zeros_like(counts)) is None
    assert per_token(values[:1], counts[:1]).half is None
    places = by_position(values, counts, 2)
    assert {place: value.mean for place, value in places.items()} == pytest.approx({0: 7 / 3, 2: 1.0})


def coverage(interval) -> float:
    """How often an interval holds the truth: 400 samples of 60 texts whose tokens err together."""
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        lengths = torch.randint(1, 9, (60, 1), generator=generator)
        values = torch.randn(60, 1, generator=generator) + 0.3 * torch.randn(60, 8, generator=generator)
        found = interval(values, torch.arange(8) < lengths)
        hits += abs(found.mean) <= found.half
    return hits / 400


def test_the_interval_holds_what_it_promises():
    assert 0.92 < coverage(per_token) < 0.98


def test_tokens_taken_as_independent_would_not():
    def naive(values, counts):
        return per_token(values[counts].unsqueeze(-1), torch.ones(int(counts.sum()), 1, dtype=torch.bool))

    assert coverage(naive) < 0.8


def test_certainty_by_hand():
    p = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], [[0.0, 1.0, 0.0], [0.25, 0.75, 0.0]]])
    log_p = p.log().nan_to_num(neginf=-1e9)
    log_p[:, 0] = log_p[:, 0].clamp(min=-50)  # possible and never chosen
    counts = torch.tensor([[True, True], [True, False]])
    found = certainty(log_p, counts)
    assert found["entropy"] == pytest.approx(math.log(2) / 3)
    assert found["max_prob"] == pytest.approx(2.5 / 3)
    assert found["entropy_share"] == pytest.approx(1 / 3)
    # slot 0: half the texts each of two codes of three; slot 1: one text, undecided between the two possible
    assert found["usage"] == pytest.approx((math.log(2) / math.log(3) + 1) / 2)
    assert certainty(log_p, torch.zeros_like(counts)) == {}


def test_one_choice_for_all_texts_is_told_from_sharp_choices():
    """Both are sharp; only where all texts choose alike is usage low."""
    sharp = torch.eye(4).log().clamp(min=-30).unsqueeze(1)
    counts = torch.ones(4, 1, dtype=torch.bool)
    alike = sharp[:1].expand(4, -1, -1)
    assert certainty(sharp, counts)["usage"] == pytest.approx(1)
    assert certainty(alike, counts)["usage"] == pytest.approx(0, abs=1e-9)
    assert certainty(sharp, counts)["max_prob"] == certainty(alike, counts)["max_prob"] == 1
