"""Pieces of a flow that is being followed: of each row one interval [s, t], where it begins and what ψ_{s,t} was.

Following the denoiser's flow from noise to text costs a forward for each step. The same forwards tell ψ of every interval of
the grid, as its steps found it: ψ_{s,t} is the sum of the steps' ψ with the weights of `split_weight`. So a student can learn
the jumps of all its few-forward answers, and not the endpoint alone, from what the endpoint costs.
Legend: B batch, L length, M masked positions, D width, V vocabulary. Times are data times, s <= t, 1 = clean text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from models.flow.solver import FewStep, FlowStep, NoisyRows
from models.functional.masked_diffusion import row_of_masked
from models.functional.noisy_mask import split_weight

POINTS = 0.125  # share of rows that keep ψ_{s,s} = D_s


class Intervals(NamedTuple):
    """points z_s (B, L, D) with their masks, times s and t (B,), and ψ_{s,t} (M, V)."""

    points: NoisyRows
    s: Tensor
    t: Tensor
    psi: Tensor


class FlowIntervals:
    """Give it to `follow_flow` as `path`; afterwards `result` has an interval of each of the first `rows` rows.

    chains: the student's numbers of forwards, each a divisor of the flow's `forwards`. One is drawn for each row, and one of
    its jumps: what is learned is what is taken. One row in eight has an interval without length instead, ψ_{s,s} = D_s.
    few_step: `chain` jumps from each time of the grid to the next, `renoise` from each to the text.
    """

    def __init__(
        self,
        begin: NoisyRows,
        rows: int,
        forwards: int,
        chains: Sequence[int],
        generator: Generator,
        few_step: FewStep = "chain",
    ) -> None:
        self.begin = NoisyRows(*(column[:rows] for column in begin))
        device = begin.z.device
        chain, jump, point = torch.rand(3, rows, generator=generator, device=device)
        jumps = torch.tensor(chains, device=device)[(chain * len(chains)).long()]
        length = forwards // jumps
        self.first = (jump * jumps).long() * length
        end = self.first + length if few_step == "chain" else torch.full_like(length, forwards)
        self.last = torch.where(point < POINTS, self.first, end)
        self.row, self.step = row_of_masked(self.begin.masked), 0
        self.z, self.psi = self.begin.z.clone(), torch.empty(0, device=device)
        self.s, self.t = torch.zeros(rows, device=device), torch.zeros(rows, device=device)

    def __call__(self, now: FlowStep) -> None:
        if self.step == 0:
            self.psi = torch.zeros_like(now.psi[: len(self.row)])
        # 1. rows that begin here: an interval without length has ψ = D
        begins, point = self.first == self.step, self.first == self.last
        self.z[begins] = now.z[: len(self.first)][begins]
        self._put(begins & point, now.s, now.s, now.d)
        self._put(begins & ~point, now.s, now.t, now.psi)
        # 2. rows that go on: one step more
        on = (self.first < self.step) & (self.step < self.last)
        here = on[self.row].nonzero().squeeze(-1)
        a = split_weight(self.s, now.s.expand_as(self.s), now.t.expand_as(self.s))[self.row[here]].unsqueeze(-1)
        self.psi[here] = a * self.psi[here] + (1 - a) * now.psi[here]
        self.t[on] = now.t
        self.step += 1

    def _put(self, rows: Tensor, s: Tensor, t: Tensor, psi: Tensor) -> None:
        here = rows[self.row].nonzero().squeeze(-1)
        self.s[rows], self.t[rows], self.psi[here] = s, t, psi[here]

    @property
    def result(self) -> Intervals:
        return Intervals(self.begin._replace(z=self.z), self.s, self.t, self.psi)
