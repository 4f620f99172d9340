"""Progress by hand: it waits for the gap, counts tokens, and is the same over ranks and after a restart."""

import pytest
import torch

from models.functional.paced import MEMORY, PacedAnnealing


def alone(tensor):
    return tensor.unsqueeze(0)


def step(pace, *gaps, reference=2.0, tokens=10, rate=0.25, gather=alone):
    for gap in gaps:
        pace.add(torch.tensor((reference + gap) * tokens), torch.tensor(reference * tokens), torch.tensor(tokens))
    pace.apply(rate, gather)
    return pace.progress


def test_it_waits_while_the_gap_is_above_the_tolerance():
    pace = PacedAnnealing(0.5)
    assert step(pace, 0.1) == 0.25
    assert pace.gap == pytest.approx(0.1)  # of one step, without bias towards 0
    assert step(pace, 9.0) == 0.25
    mean = (MEMORY * 0.1 + 9.0) / (MEMORY + 1)
    assert pace.gap == pytest.approx(mean)
    seen = [step(pace, 0.0) for _ in range(60)]
    assert seen[0] == 0.25  # the mean over steps is still above
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


def test_without_a_measurement_it_stays_as_it_is():
    pace = PacedAnnealing(0.5)
    assert step(pace) == 0.0
    step(pace, 0.1)
    assert step(pace) == 0.5  # the last gap still counts
    above = PacedAnnealing(0.5)
    step(above, 0.6)
    assert step(above) == 0.0


def test_a_gap_at_the_tolerance_goes_on():
    assert step(PacedAnnealing(0.5), 0.5) == 0.25


def test_a_reference_that_gets_worse_counts_as_a_gap():
    """The loss stays at 4.0 while the reference rises from 3.0 to 4.2: it is 1 nat above what the weights could do before."""
    pace = PacedAnnealing(0.5)
    for k in range(100):
        step(pace, 1.0 - 0.012 * k, reference=3.0 + 0.012 * k)
    assert pace.gap == pytest.approx(1.0, abs=0.01)
    assert pace.progress == 0.0
    assert pace.reference == pytest.approx(4.1, abs=0.1)
    better = PacedAnnealing(0.5)
    for _ in range(100):
        step(better, 0.4, reference=3.0, rate=0.001)
    assert better.progress == pytest.approx(0.1)


def test_micro_batches_and_ranks_count_by_their_tokens():
    """A gap of 1 over 30 tokens and of 0 over 10 is .75: above .7, where the mean of both is below."""
    pace, apart = PacedAnnealing(0.7), PacedAnnealing(0.7)
    pace.add(torch.tensor(90.0), torch.tensor(60.0), torch.tensor(30))
    assert step(pace, 0.0) == 0.0
    apart.add(torch.tensor(90.0), torch.tensor(60.0), torch.tensor(30))
    apart.apply(0.25, lambda own: torch.stack([own, torch.tensor([0.0, 20.0, 10.0], dtype=torch.float64)]))
    assert apart.gap == pytest.approx(pace.gap) == pytest.approx(0.75)
    assert apart.progress == 0.0


def test_a_restart_goes_on_from_the_kept_state():
    pace, again = PacedAnnealing(0.5), PacedAnnealing(0.5)
    step(pace, 0.4), step(pace, 0.6)
    again.load(pace.state())
    for gap in (0.3, 0.9, 0.9, 0.0):
        assert step(pace, gap) == step(again, gap)
        assert pace.gap == again.gap
    again.load(None)
    assert (again.progress, again.gap) == (0.0, 0.0)
