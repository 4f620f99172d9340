"""Intervals [s, t] of a flow that is being followed, one of each row: its first point and ψ_{s,t} over it.

Following the denoiser's flow from noise to text costs a forward pass for each step. The same passes give ψ of every interval
of the grid: ψ_{s,t} is the sum of the steps' ψ with the weights of `split_weight`. So a student can learn the jumps of its
answers in a few forward passes, and not the endpoint alone, at no further cost.
Legend: B batch, L length, M masked positions, D width, V vocabulary. Times are data times, s <= t, 1 = clean text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from models.flow.path import PathSample
from models.flow.solver import FewStep, FlowStep
from models.functional.masked_diffusion import row_of_masked
from models.functional.noisy_mask import split_weight

EMPTY_SHARE = 0.125  # rows that keep ψ_{s,s} = D_s


class Intervals(NamedTuple):
    """Where each interval begins, a sample at s (B,); its end t (B,), and ψ_{s,t} (M, V)."""

    begin: PathSample
    t: Tensor
    psi: Tensor


class FlowIntervals:
    """Give it to `follow_flow` as `on_step`; afterwards `result` has an interval of each of the first `rows` rows.

    chains: the student's numbers of forward passes, each a divisor of the flow's `forwards`. One is drawn for each row, and
    one of its jumps, so that a student learns the jumps that it takes. One row in eight has an empty interval, ψ_{s,s} = D_s.
    few_step: `chain` jumps from each time of the grid to the next, `renoise` from each to the text, `refine` from noise to the
    text.
    """

    def __init__(
        self,
        start: PathSample,
        rows: int,
        forwards: int,
        chains: Sequence[int],
        generator: Generator,
        few_step: FewStep = "chain",
    ) -> None:
        self.start = start.rows(slice(rows))
        device = start.z.device
        chain, jump, empty = torch.rand(3, rows, generator=generator, device=device)
        jumps = torch.tensor(chains, device=device)[(chain * len(chains)).long()]
        length = forwards // jumps
        self.first = (jump * jumps).long() * length
        end = self.first + length if few_step == "chain" else torch.full_like(length, forwards)
        self.last = torch.where(empty < EMPTY_SHARE, self.first, end)
        self.row, self.step = row_of_masked(self.start.masked), 0
        self.z, self.psi = self.start.z.clone(), torch.empty(0, device=device)
        self.s, self.t = torch.zeros(rows, device=device), torch.zeros(rows, device=device)

    def __call__(self, now: FlowStep) -> None:
        z, s = now.sample.z, now.sample.s
        if self.step == 0:
            self.psi = torch.zeros_like(now.psi[: len(self.row)])
        # 1. intervals that begin here; an empty one has ψ = D
        begins, empty = self.first == self.step, self.first == self.last
        self.z[begins] = z[: len(self.first)][begins]
        self._begin(begins & empty, s, s, now.d)
        self._begin(begins & ~empty, s, now.t, now.psi)
        # 2. intervals that go on are one step longer
        longer = (self.first < self.step) & (self.step < self.last)
        here = longer[self.row].nonzero().squeeze(-1)
        a = split_weight(self.s, s.expand_as(self.s), now.t.expand_as(self.s))[self.row[here]].unsqueeze(-1)
        self.psi[here] = a * self.psi[here] + (1 - a) * now.psi[here]
        self.t[longer] = now.t
        self.step += 1

    def _begin(self, rows: Tensor, s: Tensor, t: Tensor, psi: Tensor) -> None:
        here = rows[self.row].nonzero().squeeze(-1)
        self.s[rows], self.t[rows], self.psi[here] = s, t, psi[here]

    @property
    def result(self) -> Intervals:
        return Intervals(self.start._replace(z=self.z, s=self.s), self.t, self.psi)
