"""The E-step of hard EM: the best of a few candidate plans of each text, S(z) = log p(x | z) + lambda log p(z | u).

Candidates are the previous plan, the most probable plans under the posterior (a beam search), and random neighbours of these
that differ in one slot. Neighbours reach plans to which the posterior gives almost no probability.
Legend: B texts, T text columns, K candidates, S slots, W choices of a slot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from models.functional.plan_nll import plan_nll
from models.functional.plan_search import margin, plan_score, repeats, staleness
from models.interfaces.executor import Executor
from models.plans.planner import Planner
from models.plans.rows import Tokens
from models.plans.vocabulary import END, IMPOSSIBLE

ExtraScore = Callable[[Tensor], Tensor]  # plans (B, K, S) -> nats (B, K)


class Found(NamedTuple):
    """choices (B, S) of the best plans; scores, margins (B,) nats.

    gaps, flips (B,): staleness, and 1 where the plan changed; NaN where there was no previous plan.
    """

    choices: Tensor
    scores: Tensor
    margins: Tensor
    gaps: Tensor
    flips: Tensor


@dataclass
class PlanSearch:
    """candidates: plans scored for each text, beside the previous one. explore: share of them that are random neighbours.

    prior_weight: lambda of S(z).
    """

    prior: Planner
    posterior: Planner
    executor: Executor
    candidates: int = 4
    explore: float = 0.25
    prior_weight: float = 1.0

    @torch.no_grad()
    def __call__(
        self,
        prompt: Tokens,
        posterior_input: Tokens,
        text: Tensor,
        previous: Tensor,
        known: Tensor,
        generator: Generator,
        extra_score: ExtraScore | None = None,
    ) -> Found:
        """The best plans of texts (B, R).

        posterior_input: what the posterior reads. previous (B, S): earlier plans, where known (B,) bool. extra_score: added to
        S.
        """
        # 1. candidates, the previous plan first
        drawn = round(self.explore * self.candidates)
        likely = beam(self.posterior, *posterior_input, max(1, self.candidates - drawn))
        near = [self.neighbour(likely[:, k % likely.shape[1]], generator) for k in range(drawn)]
        first = [torch.where(known.unsqueeze(-1), previous, likely[:, 0])] if known.any() else []
        plans = torch.stack([*first, *likely.unbind(1), *near], 1)
        # 2. their scores, each plan once
        scores = self.scores(prompt, text, plans)
        if extra_score is not None:
            scores = scores + extra_score(plans)
        scores = scores.masked_fill(repeats(plans), -torch.inf)
        # 3. the best
        best, which = scores.max(-1)
        chosen = plans[torch.arange(len(plans), device=plans.device), which]
        gaps = staleness(best, scores[:, 0]).masked_fill(~known, torch.nan)
        flips = (chosen != previous).any(-1).to(gaps.dtype).masked_fill(~known, torch.nan)
        return Found(chosen, best, margin(scores), gaps, flips)

    @torch.no_grad()
    def scores(self, prompt: Tokens, text: Tensor, plans: Tensor) -> Tensor:
        """S of every plan (B, K, S) of its text (B, R), (B, K) nats; all candidates in one batch, the prompt read once."""
        count = plans.shape[1]
        flat, repeated = plans.flatten(0, 1), text.repeat_interleave(count, 0)
        log_text = -self.executor.nll(*self.prior.block(flat), repeated).sum(-1)
        logits = self.prior.score_many(*prompt, plans).flatten(0, 1)
        log_plan = -plan_nll(logits.log_softmax(-1), flat, self.prior.layout.open_slots(flat)).sum(-1)
        return plan_score(log_text, log_plan, self.prior_weight).view(-1, count)

    def neighbour(self, plans: Tensor, generator: Generator) -> Tensor:
        """Plans (B, S) in which one open slot was redrawn, uniformly among its possible choices; nothing follows an end."""
        layout = self.prior.layout
        where = torch.multinomial(layout.open_slots(plans).double(), 1, generator=generator)
        possible = layout.vocabulary.possible.to(plans.device)[where.squeeze(-1)]  # (B, W)
        moved = plans.scatter(1, where, torch.multinomial(possible.double(), 1, generator=generator))
        return moved.masked_fill(~layout.open_slots(moved), END)


@torch.no_grad()
def beam(planner: Planner, text: Tensor, mask: Tensor, width: int) -> Tensor:
    """The most probable plans (B, width, S) of texts (B, T) that a beam search of that width finds, best first.

    Exact where slots are independent and no type may end early. Rows that have fewer plans repeat their best.
    """
    layout, rows = planner.layout, len(text)
    slots = len(layout.slot_columns)
    plans = torch.full((rows, 1, slots), END, device=text.device)
    total = torch.zeros(rows, 1, device=text.device)
    for chosen in planner.independent_slots():
        many = plans.shape[1]
        log_p = planner.score_many(text, mask, plans).log_softmax(-1)
        origin = torch.arange(many, device=text.device).expand(rows, -1)
        for slot in chosen:
            own = log_p[:, :, slot].gather(1, origin.unsqueeze(-1).expand(-1, -1, log_p.shape[-1]))
            # after its end a type continues with ends, which cost nothing
            is_open = layout.open_slots(plans.flatten(0, 1)).view(rows, -1, slots)[..., slot : slot + 1]
            ended = torch.full_like(own, -torch.inf)
            ended[..., END] = 0.0
            sums = (total.unsqueeze(-1) + torch.where(is_open, own, ended)).flatten(1)
            total, index = sums.topk(min(width, sums.shape[1]), dim=-1)
            parent, number = index // own.shape[-1], index % own.shape[-1]
            plans = plans.gather(1, parent.unsqueeze(-1).expand(-1, -1, slots))
            origin = origin.gather(1, parent)
            plans[..., slot] = number
    plans = torch.where((total < IMPOSSIBLE / 2).unsqueeze(-1), plans[:, :1], plans)
    if plans.shape[1] < width:
        plans = torch.cat([plans, plans[:, :1].expand(-1, width - plans.shape[1], -1)], 1)
    return plans
