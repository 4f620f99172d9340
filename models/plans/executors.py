"""The executor that the options ask for."""

from models.backbones.abilities import require_free_attention
from models.functional.next_token import EndIds
from models.interfaces.executor import Executor
from models.plans.executor import AutoregressiveExecutor
from models.plans.options import PlanOptions
from models.plans.parallel_executor import ParallelExecutor
from models.plans.unified import UnifiedModel


def build_executor(model: UnifiedModel, options: PlanOptions, end_ids: EndIds) -> Executor:
    """end_ids: the tokens that end a text. Errors: UsageError for a backbone that cannot be read without a causal mask."""
    if options.executor == "autoregressive":
        return AutoregressiveExecutor(model, end_ids)
    require_free_attention(model.backbone, "module.executor=parallel", "module.executor=autoregressive, or ")
    return ParallelExecutor(model, end_ids, refinements=options.refinements[-1], redraw=options.redraw)
