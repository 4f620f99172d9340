"""The executor that the options ask for."""

from models.functional.next_token import EndIds
from models.interfaces.executor import Executor
from models.plans.executor import AutoregressiveExecutor
from models.plans.options import PlanOptions
from models.plans.parallel_executor import ParallelExecutor
from models.plans.unified import UnifiedModel


def build_executor(model: UnifiedModel, options: PlanOptions, end_ids: EndIds) -> Executor:
    """end_ids: the tokens that end a text."""
    if options.executor == "autoregressive":
        return AutoregressiveExecutor(model, end_ids)
    return ParallelExecutor(model, end_ids, refinements=options.refinements[-1], redraw=options.redraw)
