"""Exact pieces of a flow that is being followed: of each row one interval [s, t], where it begins and what ψ_{s,t} was.

Following the denoiser's flow from noise to text costs a forward for each step. The same forwards tell ψ of every interval of
the grid: ψ_{s,t} is the sum of its steps' ψ with the weights of `split_weight`, so that a student can learn its whole flow
map, and not the endpoint alone, from what the endpoint costs.
Legend: B batch, L length, M masked positions, D width, V vocabulary. Times are data times, s <= t, 1 = clean text.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from models.decoding.noisy_mask import FlowStep, NoisyRows
from models.functional.masked_diffusion import row_of_masked
from models.functional.noisy_mask import split_weight


class Intervals(NamedTuple):
    """points z_s (B, L, D) with their masks, times s and t (B,), and ψ_{s,t} (M, V)."""

    points: NoisyRows
    s: Tensor
    t: Tensor
    psi: Tensor


class FlowIntervals:
    """Give it to `follow_flow` as `path`; afterwards `result` has the intervals.

    Half of the rows begin at s = 0, the others at any step of the grid; they end at the same step (ψ_{s,s} = D_s) or at any
    later one, up to t = 1.
    """

    def __init__(self, begin: NoisyRows, forwards: int, generator: Generator) -> None:
        n, device = len(begin.z), begin.z.device
        at_start, place, length = torch.rand(3, n, generator=generator, device=device)
        self.first = torch.where(at_start < 0.5, 0, (place * forwards).long())
        self.last = self.first + (length * (forwards - self.first + 1)).long()
        self.begin, self.row, self.step = begin, row_of_masked(begin.masked), 0
        self.z, self.psi = begin.z.clone(), torch.zeros(())
        self.s, self.t = torch.zeros(n, device=device), torch.zeros(n, device=device)

    def __call__(self, now: FlowStep) -> None:
        # 1. rows that begin here: an interval without length has ψ = D
        begins, point = self.first == self.step, self.first == self.last
        self.z[begins] = now.z[begins]
        self.s = torch.where(begins, now.s, self.s)
        begun = torch.where(point[self.row].unsqueeze(-1), now.d, now.psi)
        # 2. rows that go on: one step more
        inside = (self.first < self.step) & (self.step < self.last)
        a = split_weight(self.s, now.s.expand_as(self.s), now.t.expand_as(self.s))[self.row].unsqueeze(-1)
        longer = a * self.psi + (1 - a) * now.psi
        # 3. the others stay as they are
        self.psi = torch.where(inside[self.row].unsqueeze(-1), longer, self.psi)
        self.psi = torch.where(begins[self.row].unsqueeze(-1), begun, self.psi)
        self.t = torch.where(inside | (begins & ~point), now.t, torch.where(begins, now.s, self.t))
        self.step += 1

    @property
    def result(self) -> Intervals:
        """Second-order steps may leave the simplex a little: ψ is put back on it."""
        psi = self.psi.clamp(min=0)
        return Intervals(self.begin._replace(z=self.z), self.s, self.t, psi / psi.sum(-1, keepdim=True))
