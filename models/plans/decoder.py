"""Prompt -> plan -> text as a `Decoder`: the prior writes the plan, the executor writes the text from the plan alone.

Legend: B batch, L columns of a row, R response columns.
"""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from models.functional.next_token import EndIds, until_end
from models.interfaces.decoder import TokenCallback
from models.interfaces.executor import Executor
from models.plans.plan_text import CodeNames, plan_texts
from models.plans.planner import Planner, sampled


class PlannedDecoder:
    """plan_temperature, temperature: of concepts and tokens; 0 takes the most probable.

    fixed: {slot: choice} of concepts that are not drawn. plans: those of the last batch, as a person reads them. names: of
    codes that have some.
    forwards: forward passes, those of a plan (as many as it has rounds: one with planning=slots) and the most of the executor.
    forward_passes: of each text of the last batch, (B,), where an executor that writes token after token ends at end_ids.
    """

    method = "student"

    def __init__(
        self,
        planner: Planner,
        executor: Executor,
        response_length: int,
        *,
        plan_temperature: float = 1.0,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        end_ids: EndIds = None,
        fixed: Mapping[int, int] | None = None,
        names: CodeNames | None = None,
    ) -> None:
        self.planner, self.executor, self.length = planner, executor, response_length
        self.plan_temperature, self.temperature = plan_temperature, temperature
        self.vocab_size, self.end_ids, self.fixed, self.names = vocab_size, end_ids, fixed, names
        self.plans: list[str] = []
        self.rounds = len(planner.layout.rounds(planner.planning))
        self.forwards = self.rounds + executor.forwards(response_length)
        self.forward_passes: Tensor | None = None
        self.refines = executor.refines
        how = {True: "sampled", False: "greedy"}
        self.name = f"plan {how[plan_temperature > 0]}, text {how[temperature > 0]}" + executor.suffix

    @torch.no_grad()
    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        ids, mask = (rows[name][:, : -self.length] for name in ("input_ids", "attention_mask"))
        plan = self.planner.draw(ids, mask, sampled(generator, self.plan_temperature), self.fixed)
        self.plans = plan_texts(self.planner.layout.vocabulary, plan.choices, self.names)
        found = self.executor.generate(
            plan.ids,
            plan.embeds,
            self.length,
            generator,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            end_ids=self.end_ids,
            on_tokens=on_tokens,
        )
        if self.end_ids is not None and not self.refines:
            self.forward_passes = self.rounds + until_end(found, self.end_ids).sum(-1)
        return found
