"""Costs of forward passes, on a clock that the models themselves advance."""

import pytest
import torch
from helpers.qwen import tiny_qwen

from models.speculative import costs as qstar_costs
from models.speculative.costs import forward_costs

PROMPTS = torch.randint(4, 50, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def clock(monkeypatch):
    time = [0.0]
    monkeypatch.setattr(qstar_costs, "perf_counter", lambda: time[0])
    return time


def takes(clock, first, further):
    """Scores of a model that takes `first` seconds for one position and `further` for each more."""

    def scores(ids, lengths, count):
        clock[0] += first + further * (count - 1)

    return scores


@pytest.mark.parametrize("turned", [False, True])
def test_costs_are_those_of_the_clock(clock, turned):
    """w is that of the slower model, whichever that is, as a fraction of its pass of one position."""
    small, large, third = takes(clock, 1.0, 0.9), takes(clock, 4.0, 0.8), takes(clock, 0.5, 0.0)
    pair = (large, small) if turned else (small, large)
    assert forward_costs(*pair, PROMPTS) == pytest.approx((4.0 if turned else 0.25, 0.2))
    assert forward_costs(*pair, PROMPTS, third) == pytest.approx((0.1, 0.2))


def test_further_positions_never_save(clock):
    assert forward_costs(takes(clock, 1.0, 0.0), takes(clock, 2.0, -0.1), PROMPTS).position_cost == 0.0


def test_real_models_are_timed_behind_their_prompt(monkeypatch):
    """Each reads the prompt once, then one position or five; the prompt is not timed."""
    seen = []
    model = tiny_qwen(0)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    found = forward_costs(model, tiny_qwen(1), PROMPTS, repeats=1)
    assert found.cost > 0
    assert found.position_cost >= 0
    assert seen[:4] == [6, 1, 6, 1]
    assert set(seen[4:]) <= {6, 5}
