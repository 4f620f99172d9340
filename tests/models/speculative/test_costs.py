"""Costs of forward passes, on a clock that the models themselves advance."""

from types import SimpleNamespace

import pytest
import torch
from helpers.qwen import tiny_qwen

from models.speculative import costs as qstar_costs
from models.speculative.block_drafter import BlockDrafter, BlockDrafterOptions
from models.speculative.costs import forward_costs
from models.speculative.distribution import MixtureDist
from models.speculative.state import QStarRun

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


class Rounds:
    """Rounds whose time is known: 8 seconds without a draft, and what a draft and its tokens add."""

    def __init__(self, clock, first, each):
        self.clock, self.first, self.each, self.sizes = clock, first, each, []
        self.run = SimpleNamespace(ids=PROMPTS)

    def __call__(self, size):
        self.sizes.append(size)
        self.clock[0] += 8.0 + (self.first + self.each * size if size else 0.0)


def test_costs_of_a_drafter_of_blocks_give_the_time_of_a_round(clock):
    rounds = Rounds(clock, 1.5, 0.25)
    cost, position_cost = qstar_costs._block_costs(rounds, 3, repeats=2)
    for k in (1, 2, 3):
        assert 8 * (1 + cost + k * position_cost) == pytest.approx(8 + 1.5 + 0.25 * k)
    assert rounds.sizes == [0] * 3 + [1] * 3 + [3] * 3
    assert qstar_costs._block_costs(Rounds(clock, -2.0, -0.5), 3, repeats=2) == (qstar_costs.LEAST_COST, 0.0)


def test_a_round_counts_what_is_done_beside_the_forward_passes(clock, monkeypatch):
    """Where a draw takes as long as a forward pass, a draft costs less than its forward passes say."""
    own = [tiny_qwen(0), tiny_qwen(1)]
    drafter = drafter_of(dict(zip(("theta", "target"), own, strict=True)))

    def takes_time(owner, name, seconds):
        plain = getattr(owner, name)

        def slow(*given, **more):
            clock[0] += seconds
            return plain(*given, **more)

        monkeypatch.setattr(owner, name, slow)

    takes_time(drafter, "propose", 2.0)
    for model in own:
        takes_time(model, "forward", 1.0)
    alone = forward_costs(*own, PROMPTS, drafter)
    assert alone == pytest.approx((1.0, 0.0))  # 2 seconds over 2, whatever the length
    takes_time(QStarRun, "next_token_dist", 2.0)  # once a round: 6 seconds over 4
    assert forward_costs(*own, PROMPTS, drafter) == pytest.approx((0.5, 0.0))
    once = forward_costs(own[0], own[0], PROMPTS, drafter_of({"theta": own[0]}))
    assert once == (qstar_costs.LEAST_COST, 0.0)  # its own drafts take no time on this clock


def test_every_round_is_timed_from_the_same_position_behind_the_prompt(monkeypatch):
    own = [tiny_qwen(0), tiny_qwen(1)]
    drafter, seen = drafter_of(dict(zip(("theta", "target"), own, strict=True))), []
    propose = drafter.propose

    def watched(states, read, last, size, draws, shape):
        assert read[:, -1].all()  # the token before the last was read
        seen.append((size, last.tolist()))
        return propose(states, read, last, size, draws, shape)

    monkeypatch.setattr(drafter, "propose", watched)
    assert all(value >= 0 for value in forward_costs(*own, PROMPTS, drafter, repeats=3, mixture=MixtureDist(0.5)))
    assert [size for size, _ in seen] == [1] * 4 + [3] * 4
    assert len({str(last) for _, last in seen}) == 1
