"""ConceptBaselineModule: a planner-executor whose plans nobody learns, so that learned ones can be compared at equal rate."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from models.functional.errors import UsageError, require_choice
from models.functional.fixed_codes import leading_tokens, random_hash, surprising_tokens, unigram_surprisal
from models.plans.planner import Plan

Code = Literal["leading", "surprisal", "hash"]
USED = (
    "corruption",
    "anneal_share",
    "plan_temperature",
    "temperature",
    "lora_rank",
    "lr",
    "weight_decay",
    "warmup_steps",
    "seed",
)


class ConceptBaselineModule(ConceptPlannerExecutorModule):
    """code: what stands in the place of the posterior's plan; the prior learns to predict it, the executor reads it alone.

    leading: the first `tokens` words of the text; surprisal: the `tokens` that are rarest in the training texts, in reading
    order; hash: a random code of the whole text, of `types` as a plan has them. Only the losses text and planner are used, and
    of the other options of a planner-executor those in USED: the rest say how a plan is learned.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        code: Code,
        tokens: int = 2,
        types: Mapping[str, Mapping[str, int | None] | None] | None = None,
        weights: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        require_choice("module.code", code, get_args(Code))
        if tokens < 1:
            raise UsageError(f"module.tokens={tokens} must be at least 1")
        if code != "hash":
            types = {"words": {"codes": model.get_input_embeddings().num_embeddings, "most": tokens}}
        losses = {name: (weights or {}).get(name, 1.0) for name in ("text", "planner")}
        known = inspect.signature(ConceptPlannerExecutorModule.__init__).parameters
        if unknown := set(options) - set(known):
            raise TypeError(f"ConceptBaselineModule got an unexpected keyword argument {min(unknown)!r}")
        used = {name: value for name, value in options.items() if name in USED}
        super().__init__(model, types=types or {}, weights=losses, noise=(0.0, 0.0), **used)
        self.code, self.tokens = code, tokens
        self.register_buffer("surprisal", None, persistent=False)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule
        if self.code != "hash" and self.tokens > data.response_length:
            raise UsageError(
                f"module.tokens={self.tokens} must not be above the response length {data.response_length}"
            )
        rows = data.rows["train"].columns
        self.surprisal = unigram_surprisal(self._text(rows), self.model.vocabulary.base).to(self.device)

    def codes_of(self, batch: dict[str, Tensor]) -> Tensor:
        """Choices (B, S): the code of each text, counted from 1."""
        text = self._text(batch)
        if self.code == "leading":
            return 1 + leading_tokens(text, self.tokens)
        if self.code == "surprisal":
            return 1 + surprising_tokens(text, self.surprisal.to(text.device), self.tokens)
        vocabulary = self.model.vocabulary
        sizes = torch.tensor([vocabulary.types[k].codes for k in vocabulary.slot_types.tolist()])
        return 1 + random_hash(text, sizes)

    def _drawn(self, batch: dict[str, Tensor], generator: Generator, temperature: float, noise: float) -> Plan:
        return self._most_probable(batch)

    def _most_probable(self, batch: dict[str, Tensor]) -> Plan:
        return self.planner.certain(self.codes_of(batch))
