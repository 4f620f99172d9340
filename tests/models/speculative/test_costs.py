"""Costs of forward passes, on a clock that the models themselves advance."""

import pytest
import torch
from helpers.qwen import tiny_qwen

from models.speculative import costs as qstar_costs
from models.speculative.block_drafter import BlockDrafter, BlockDrafterOptions
from models.speculative.costs import forward_costs

PROMPTS = torch.randint(4, 50, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def clock(monkeypatch):
    time = [0.0]
    monkeypatch.setattr(qstar_costs, "perf_counter", lambda: time[0])
    return time


def drafter_of(verifiers):
    torch.manual_seed(0)
    return BlockDrafter(verifiers, BlockDrafterOptions(draft_length=3, window=4, rank=4), 50).eval()


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


def test_costs_of_a_drafter_of_blocks_give_the_time_of_a_round(clock, monkeypatch):
    """A draft of k tokens takes what the clock says: the drafter's pass and tokens, and the verified positions."""
    drafter = drafter_of({"theta": tiny_qwen(0), "target": tiny_qwen(1)})

    def timed(model, ids, positions, repeats):
        return {0: 3.0, 1: 5.0}[model] + 0.5 * (positions - 1)

    monkeypatch.setattr(qstar_costs, "_seconds", timed)
    monkeypatch.setattr(qstar_costs, "_drafting_seconds", lambda *given: 1.5 + 0.25 * given[3])
    cost, position_cost = forward_costs(0, 1, PROMPTS, drafter)
    for k in (1, 2, drafter.block_length):
        assert 8 * (1 + cost + k * position_cost) == pytest.approx(8 + k * 1.0 + 1.5 + 0.25 * k)
    assert forward_costs(0, 0, PROMPTS, drafter) == pytest.approx(((1.5) / 3, 0.75 / 3))  # one model is counted once


def test_a_drafter_of_blocks_is_timed_behind_its_prompt(clock, monkeypatch):
    models = {"theta": tiny_qwen(0), "target": tiny_qwen(1)}
    drafter, sizes = drafter_of(models), []
    propose = drafter.propose

    def slow(states, read, last, size, draws, shape):
        assert read[:, -1].all()  # the token before the last was read
        clock[0] += 2.0
        sizes.append(size)
        return propose(states, read, last, size, draws, shape)

    monkeypatch.setattr(drafter, "propose", slow)
    assert qstar_costs._drafting_seconds(models, PROMPTS, drafter, 2, 3) == 2.0
    assert sizes == [2] * 4
