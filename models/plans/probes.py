"""What a planner-executor shows to monitors (the protocols of models/interfaces/probes.py).

Legend: B batch, R response columns, S concept slots.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn import Parameter

from models.functional.bits_per_byte import token_nll
from models.functional.next_token import until_end
from models.interfaces.probe_batch import Choices, ProbeBatch
from models.plans.executor import Executor
from models.plans.planner import Coder, Planner
from models.plans.unified import UnifiedModel
from models.plans.wrong_plans import block_without, random_plan


class PlanProbes:
    """A mixin of the module. A condition is a plan: choices (B, S), and which of its concepts are seen (B, S) bool."""

    model: UnifiedModel
    planner: Planner
    executor: Executor
    trainer: Any
    relaxation: tuple[Tensor, Tensor] | None = None
    e_step = None

    def probe_batch(self, rows: dict[str, Tensor], generator: Generator) -> ProbeBatch:
        """The rows' texts and their most probable plans."""
        plan = self._most_probable(rows)
        text = self._text(rows)
        seen = torch.ones_like(plan.choices, dtype=torch.bool)
        counts = until_end(text, self.trainer.datamodule.tokenizer.eos_token_id)
        return ProbeBatch(text, counts, {"choices": plan.choices, "seen": seen})

    def nll(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        return token_nll(self.executor.logits(*self._block(batch), batch.text), batch.text)

    def corrupt_condition(self, batch: ProbeBatch, how: str, generator: Generator) -> dict[str, Tensor]:
        if how == "blank":
            return batch.condition | {"seen": torch.zeros_like(batch.condition["seen"])}
        choices = random_plan(self.model.vocabulary, batch.condition["choices"], generator)
        return batch.condition | {"choices": choices}

    def condition_features(self, batch: ProbeBatch) -> Tensor:
        """One-hot choices: the squared distance is twice the number of slots that differ."""
        most = self.model.vocabulary.choices.shape[1]
        return F.one_hot(batch.condition["choices"], most).flatten(1).double()

    def rebuilt(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        """(B,) bool: texts that the executor, running freely and greedily, writes again from the condition."""
        return ((self._rewritten(batch) == batch.text) | ~batch.counts).all(-1)

    def predictions(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        """(B, 2, R): the likeliest word at each place after the text's own words, and after the executor's own."""
        forced = self.executor.logits(*self._block(batch), batch.text)[..., : self.words].argmax(-1)
        return torch.stack([forced, self._rewritten(batch)], 1)

    def _rewritten(self, batch: ProbeBatch) -> Tensor:
        return self._written(self._block(batch), batch.text.shape[1])

    def _written(self, block: tuple[Tensor, Tensor], length: int) -> Tensor:
        """The greedy text (B, R) of a plan's ids and embeddings."""
        unused = Generator(device=block[0].device)
        return self.executor.generate(*block, length, unused, temperature=0.0, vocab_size=self.words)

    @property
    def words(self) -> int:
        return len(self.trainer.datamodule.tokenizer)

    def drop_concepts(self, batch: ProbeBatch, order: Tensor, share: float) -> dict[str, Tensor]:
        """The plan without the concepts whose `order` (B, S), uniform in [0, 1), is below the share."""
        return batch.condition | {"seen": batch.condition["seen"] & (order >= share)}

    def choices(self, rows: dict[str, Tensor], generator: Generator) -> dict[str, Choices]:
        """Of the posterior, and of the prior at the same plans."""
        plan = self._most_probable(rows)
        prior = self._prior_logits(rows, plan.choices)
        logits = {"posterior": plan.logits, "prior": prior}
        return {who: Choices(own.log_softmax(-1), plan.open_slots) for who, own in logits.items()}

    @property
    def slot_names(self) -> list[str]:
        """The type of each slot and, where it has several, its place."""
        types = self.model.vocabulary.types
        return [t.name if t.most == 1 else f"{t.name}{place + 1}" for t in types for place in range(t.most)]

    def concepts_of(self, rows: dict[str, Tensor]) -> Tensor:
        """The most probable choices (B, S), as the executor reads them."""
        return self._most_probable(rows).choices

    def posterior_concepts(self, rows: dict[str, Tensor]) -> Tensor:
        """The most probable choices (B, S), all of them the posterior's own words."""
        if self.told is None:
            return self.concepts_of(rows)
        return self.posterior.draw(*self._whole(rows), Coder(self.model.quantiser)).choices

    def planner_parameters(self) -> Iterable[Parameter]:
        """The head that chooses concepts."""
        return self.model.new_head.parameters()

    def _block(self, batch: ProbeBatch) -> tuple[Tensor, Tensor]:
        return block_without(self.planner, batch.condition["choices"], batch.condition["seen"])
