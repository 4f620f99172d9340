"""ConceptBaselineModule: a planner-executor whose plans are not learned, to compare learned ones with at equal rate."""

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from models.functional.errors import UsageError
from models.plans.options import FixedPlanOptions
from models.plans.rows import response_of
from models.plans.sources import FixedPlans

# options of how a plan is learned, with values that switch them off
NOT_LEARNED: dict[str, Any] = {
    "sampler": "gumbel_st",
    "planning": {"prior": "sequential", "posterior": "sequential"},
    "posterior_reads": "all",
    "signals": None,
    "signal_codes": False,
    "curriculum": 0.0,
    "search": None,
    "free_bits": 0.0,
    "quota": None,
    "quota_gain": 0.0,
    "noise": (0.0, 0.0),
}


class ConceptBaselineModule(ConceptPlannerExecutorModule):
    """The prior learns to predict a fixed code of the text, and the executor writes the text from it alone.

    options, changes: see `FixedPlanOptions`. Only the losses text and planner are used.
    """

    options_class: ClassVar[type[FixedPlanOptions]] = FixedPlanOptions
    options: FixedPlanOptions
    source: FixedPlans

    def __init__(self, model: nn.Module, options: FixedPlanOptions | None = None, **changes: Any) -> None:
        given = replace(options or FixedPlanOptions(), **changes)
        weights = {name: given.filled_weights.get(name, 1.0) for name in ("text", "planner")}
        types = given.types
        if given.code != "hash":
            types = {"words": {"codes": model.get_input_embeddings().num_embeddings, "most": given.tokens}}
        super().__init__(model, replace(given, types=types, weights=weights, **NOT_LEARNED))

    def build_source(self) -> FixedPlans:
        return FixedPlans(self.planner, self.options.code, self.options.tokens)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data, tokens = self.trainer.datamodule, self.options.tokens
        if self.options.code != "hash" and tokens > data.response_length:
            raise UsageError(f"module.tokens={tokens} must not be above the response length {data.response_length}")
        self.source.fit(response_of(data.rows["train"].columns))
