"""What held-out texts say of a planner and an executor: likelihoods, rates, and texts written from plans.

Legend: B batch, R response columns, S concept slots, A attributes of the corpus' hidden plans, K types.
"""

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from models.functional.plan_nll import plan_nll
from models.functional.vocabulary import vocabulary_size
from models.interfaces.executor import Executor, greedy_texts
from models.plans.meter import PlanMeter
from models.plans.planner import Plan, Planner
from models.plans.rows import prompt_of, response_of
from models.plans.sources import PlanSource, StepValues

Block = tuple[Tensor, Tensor]  # ids (B, C) and embeddings (B, C, D) of a plan, as the executor reads them


class Measured(NamedTuple):
    """plan: of each text. prior (B, S, W): its logits under the prior. nll (B, R): of the texts given it, nats.

    choices (B, S): of the most probable plans. tokens (B,): of the texts.
    """

    plan: Plan
    prior: Tensor
    nll: Tensor
    choices: Tensor
    tokens: Tensor


class Measurement:
    """Adds batches to a `PlanMeter`.

    data, where it is asked for: the corpus, with its tokenizer. Where it knows them, `true_nll` and `hidden_plans` give the
    texts' own likelihood and plans.
    """

    def __init__(self, planner: Planner, executor: Executor, source: PlanSource, meter: PlanMeter) -> None:
        self.planner, self.executor, self.source, self.meter = planner, executor, source, meter

    @torch.no_grad()
    def add(
        self,
        batch: dict[str, Tensor],
        data: Any,
        final: StepValues,
        generator: Generator,
        *,
        previous: Tensor | None = None,
        testing: bool = False,
    ) -> Measured:
        """final: the last values of all schedules. previous (B, S): earlier plans of the texts.

        testing: also what is too slow for a validation: texts with swapped concepts, and the any-order bound of an executor
        that can read any part of a text.
        """
        text = response_of(batch)
        # 1. a plan: its NLL under posterior and prior, and the text's given the plan
        best = self.source.most_probable(batch)
        plan = self.source.draw(batch, final, generator)[0] if self.source.is_random else best
        prior = self.planner.score(*prompt_of(batch), plan.choices)
        nll = self.executor.nll(plan.ids, plan.embeds, text)
        log_p, log_q = prior.log_softmax(-1), plan.logits.log_softmax(-1)
        prior_nll, posterior_nll = (
            plan_nll(logs, plan.choices, plan.open_slots).sum(-1) for logs in (log_p, log_q * final.noise)
        )
        # 2. the text given another text's plan
        shuffled = self.executor.nll(plan.ids.roll(1, 0), plan.embeds.roll(1, 0), text)
        # 3. the most probable plan, and the text written from it
        written = self.greedy_text((best.ids, best.embeds), text.shape[1], data)
        sums = {"text": nll.sum(-1), "shuffled": shuffled.sum(-1), "rebuilt": (written == text).all(-1)}
        sums |= {"prior": prior_nll, "posterior": posterior_nll}
        if testing and self.executor.refines:
            sums["any_order"] = self.executor.training_nll(plan.ids, plan.embeds, text, 0.0, generator) * text.shape[1]
        # 4. what the corpus knows
        if hasattr(data, "true_nll"):
            sums["truth"] = data.true_nll(batch)
        hidden = data.hidden_plans(batch) if hasattr(data, "hidden_plans") else None
        tokens = self.executor.tokens_of(text)
        self.meter.update(sums, tokens, best.choices, hidden, previous)
        if testing and hidden is not None:
            self.meter.update_swaps(hidden.roll(1, 0), self._swapped(batch, best.choices, data))
        return Measured(plan, prior, nll, best.choices, tokens)

    def greedy_text(self, block: Block, length: int, data: Any) -> Tensor:
        """The most probable texts (B, length) of plans."""
        return greedy_texts(self.executor, *block, length, vocabulary_size(data.tokenizer))

    def _swapped(self, batch: dict[str, Tensor], choices: Tensor, data: Any) -> Tensor:
        """Hidden plans (B, K, A) of the texts written with one type's concepts of the previous text in the batch."""
        found, prompt = [], prompt_of(batch)[0]
        for own in self.planner.layout.vocabulary.type_slots:
            mixed = choices.clone()
            mixed[:, own] = choices.roll(1, 0)[:, own]
            text = self.greedy_text(self.planner.block(mixed), response_of(batch).shape[1], data)
            found.append(data.hidden_plans(batch | {"input_ids": torch.cat([prompt, text], -1)}))
        return torch.stack(found, 1)
