"""What a planner-executor offers to monitors: the protocols of models/interfaces/probes.py.

Legend: B batch, R response columns, S concept slots.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.functional.next_token import until_end
from models.functional.plan_nll import plan_nll
from models.functional.vocabulary import vocabulary_size
from models.interfaces.executor import Executor, greedy_texts
from models.interfaces.probe_batch import Choices, EStep, ProbeBatch
from models.interfaces.probes import Corruption
from models.plans.corrupted_plans import block_without, random_plan
from models.plans.enumeration import every_plan, log_prob_of_texts
from models.plans.matching import codes_of_attributes, match_types
from models.plans.planner import Planner
from models.plans.posterior_gradient import PosteriorGradient
from models.plans.rows import PosteriorReads, prompt_of, response_of
from models.plans.sources import PlanSource


class PlanProbe:
    """A condition is a plan: choices (B, S), and which of its concepts the executor can see, `seen` (B, S) bool.

    tokenizer: the corpus', needed for texts. relaxation, e_step: of the last training step, see `RelaxationProbe` and
    `SearchProbe`; the training sets them. gradient: what the training has it watch.
    """

    def __init__(self, prior: Planner, executor: Executor, source: PlanSource, posterior_reads: PosteriorReads) -> None:
        self.prior, self.executor, self.source = prior, executor, source
        self.posterior_reads = posterior_reads
        self.vocabulary = prior.layout.vocabulary
        self.tokenizer: Any = None
        self.relaxation: tuple[Tensor, Tensor] | None = None
        self.e_step: EStep | None = None
        self.gradient = PosteriorGradient()

    # -- texts and their plans ----------------------------------------------------------------------------------------

    def probe_batch(self, rows: dict[str, Tensor], generator: Generator) -> ProbeBatch:
        """The rows' texts and their most probable plans."""
        choices, text = self.source.most_probable(rows).choices, response_of(rows)
        counts = until_end(text, self.tokenizer.eos_token_id)
        return ProbeBatch(text, counts, {"choices": choices, "seen": torch.ones_like(choices, dtype=torch.bool)})

    def concepts(self, rows: dict[str, Tensor]) -> Tensor:
        return self.source.most_probable(rows).choices

    def posterior_concepts(self, rows: dict[str, Tensor]) -> Tensor:
        return self.source.without_signals(rows).choices

    @property
    def slot_names(self) -> list[str]:
        """The type of each slot and, where it has several, the number of the concept, then `.` and the level."""
        return [
            t.name + (str(number) if t.most > 1 else "") + (f".{level}" if t.levels > 1 else "")
            for t in self.vocabulary.types
            for number in range(1, 1 + t.most)
            for level in range(1, 1 + t.levels)
        ]

    def choices(self, rows: dict[str, Tensor], generator: Generator) -> dict[str, Choices]:
        """Of the posterior, where plans are learned, and of the prior at the same plans."""
        plan = self.source.most_probable(rows)
        logits = {"posterior": plan.logits} if self.source.is_learned else {}
        logits["prior"] = self.prior.score(*prompt_of(rows), plan.choices)
        return {who: Choices(own.log_softmax(-1), plan.open_slots) for who, own in logits.items()}

    def take_planner_gradient(self) -> Tensor | None:
        return self.gradient.take()

    # -- texts given plans --------------------------------------------------------------------------------------------

    def block(self, batch: ProbeBatch) -> tuple[Tensor, Tensor]:
        """Ids and embeddings of the batch's plans, as the executor reads them."""
        return block_without(self.prior, batch.condition["choices"], batch.condition["seen"])

    def nll(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        return self.executor.nll(*self.block(batch), batch.text)

    def predictions(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        forced = self.executor.logits(*self.block(batch), batch.text)[..., : vocabulary_size(self.tokenizer)].argmax(-1)
        return torch.stack([forced, self._greedy_text(batch)], 1)

    def rebuilt(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        return ((self._greedy_text(batch) == batch.text) | ~batch.counts).all(-1)

    def _greedy_text(self, batch: ProbeBatch) -> Tensor:
        block, length = self.block(batch), batch.text.shape[1]
        return greedy_texts(self.executor, *block, length, vocabulary_size(self.tokenizer))

    def log_prob(self, rows: dict[str, Tensor]) -> Tensor | None:
        plans = every_plan(self.prior.layout)
        if plans is None:
            return None
        text = response_of(rows)
        return log_prob_of_texts(self.prior, self.executor, prompt_of(rows), text, plans.to(text.device))

    def bound(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        choices = batch.condition["choices"]
        log_p = self.prior.score(*prompt_of(rows), choices).log_softmax(-1)
        own = plan_nll(log_p, choices, self.prior.layout.open_slots(choices)).sum(-1)
        return self.nll(rows, batch).sum(-1) + own

    def given_attributes(self, batch: ProbeBatch, attributes: Tensor) -> dict[str, Tensor] | None:
        choices = batch.condition["choices"]
        if len(self.vocabulary.types) < choices.shape[1]:
            return None
        known = attributes.to(choices.device)
        return batch.condition | {
            "choices": codes_of_attributes(choices, known, match_types(choices.cpu(), known.cpu())[0])
        }

    # -- other conditions ---------------------------------------------------------------------------------------------

    def corrupt_condition(self, batch: ProbeBatch, how: Corruption, generator: Generator) -> dict[str, Tensor]:
        if how == "blank":
            return batch.condition | {"seen": torch.zeros_like(batch.condition["seen"])}
        choices = random_plan(self.vocabulary, batch.condition["choices"], generator)
        return batch.condition | {"choices": choices}

    def drop_concepts(self, batch: ProbeBatch, order: Tensor, share: float) -> dict[str, Tensor]:
        return batch.condition | {"seen": batch.condition["seen"] & (order >= share)}

    def condition_features(self, batch: ProbeBatch) -> Tensor:
        """One-hot choices: the squared distance is twice the number of slots that differ."""
        most = self.vocabulary.choices.shape[1]
        return F.one_hot(batch.condition["choices"], most).flatten(1).double()
