"""Updates once an optimiser step: rates from the counts of its micro-batches alone, codebooks from all of their points."""

import torch

from models.online.codebook_update import CodebookUpdate
from models.online.codes import Coded
from models.online.concept_stack import Level
from models.online.rate_control import RateController
from models.online.router import Routing


class Recorder:
    """In place of a router and of a space: keeps what it was called with."""

    def __init__(self) -> None:
        self.calls = []

    def correct_offset(self, realised, compression, moments) -> None:
        self.calls.append((realised.item(), compression, moments.tolist()))

    def begin(self, points, generator) -> None:
        self.calls.append(("begin", points.flatten().tolist()))

    def follow(self, points, decay, generator) -> int:
        self.calls.append(("follow", points.flatten().tolist(), decay))
        return 3


def level(commits: int, points: list[float]) -> Level:
    """One row of four positions, and as many concepts as there are points, the last of them padding."""
    commit = torch.arange(4)[None] < commits
    routing = Routing(commit, commit.float(), torch.ones_like(commit), torch.tensor([4.0, commits, 1.0]), 2.0)
    embeds, real = torch.zeros(1, len(points), 2), torch.ones(1, len(points), dtype=torch.bool)
    real[:, -1] = False
    zeros = torch.zeros(1, len(points))
    return Level(routing, Coded(embeds, zeros, zeros, zeros, torch.tensor(points).view(1, -1, 1)), real, embeds)


def test_a_rate_is_that_of_all_micro_batches_since_the_last_step():
    rates, router = RateController(), Recorder()
    for commits in (4, 1):
        rates.add([level(commits, [0.0])])
    rates.apply([router], lambda sums: torch.stack([sums, sums]))  # two ranks alike
    rates.apply([router], lambda sums: sums[None])  # nothing was added
    rates.add([level(2, [0.0])])
    rates.apply([router], lambda sums: sums[None])
    assert router.calls == [(5 / 8, 2.0, [16.0, 10.0, 4.0]), (0.5, 2.0, [4.0, 2.0, 1.0])]


def test_codes_start_once_and_follow_the_points_of_all_micro_batches():
    update, space = CodebookUpdate(0.9), Recorder()
    for points in ([1.0, 2.0, 9.0], [3.0, 9.0], [9.0]):  # the last has no concept
        update.add([level(1, points)], 4, lambda own: own)
    assert update.apply([space], torch.Generator, start=True) == {0: 3}
    update.add([level(1, [4.0, 9.0])], 4, lambda own: own)
    update.apply([space], torch.Generator, start=False)
    every = [1.0, 2.0, 3.0]
    assert space.calls == [("begin", every), ("follow", every, 0.9), ("follow", [4.0], 0.9)]
    update.add([level(0, [9.0])], 4, lambda own: own)
    assert update.apply([space], torch.Generator, start=False) == {}
