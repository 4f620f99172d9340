"""What a training step costs in floating point operations: those of the model, whatever is computed twice to save memory."""

from collections.abc import Mapping

from torch import Generator, Tensor, nn

from lightning_modules.training.compile import without_recomputation
from lightning_modules.training.flops import run_counted
from models.interfaces.objective import Objective, Terms

COUNTED_ROWS = 2
MOST_DRAWS = 16  # until two of them differ in how many positions they predict


def flops_of_step(objective: Objective, model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Model FLOPs of a forward and backward pass over the batch, matrix products only. Gradients are left on the weights.

    Layers that are recomputed in the backward pass (recompute=true) count once, as in Model FLOPs Utilisation (Chowdhery et
    al., PaLM, 2022). Two of the rows are counted, and the others taken to cost as much. Where an objective draws for how many
    positions it computes logits, the result is that of the expected number: FLOPs are a line in it, through two draws.
    """
    few = {name: column[:COUNTED_ROWS] for name, column in batch.items()}
    device = next(iter(batch.values())).device
    scale = len(next(iter(batch.values()))) / len(next(iter(few.values())))

    def draw(seed: int) -> tuple[Terms, float]:
        def step() -> Terms:
            terms = objective(model, few, Generator(device=device).manual_seed(seed))
            terms.loss.backward()
            return terms

        return run_counted(step)

    with without_recomputation(model):
        expected = getattr(objective, "expected_predictions", lambda batch: None)(batch)
        # 1. every draw predicts as many positions, or costs are a mean over draws
        if expected is None:
            draws = getattr(objective, "kinds_of_batch", 1)
            return sum(draw(seed)[1] for seed in range(draws)) / draws * scale
        # 2. the cost of one position more, from two draws
        flops: dict[int, float] = {}
        for seed in range(MOST_DRAWS):
            terms, cost = draw(seed)
            if "predictions" in terms.raw:
                flops[int(terms.raw["predictions"])] = cost
            if len(flops) == 2:
                return _on_the_line(flops, expected, scale)
        # 3. all draws were alike
        return cost * scale


def _on_the_line(flops: Mapping[int, float], expected: float, scale: float) -> float:
    """flops: {predictions: FLOPs} of two draws of the counted rows; expected: predictions of the whole batch."""
    (few, low), (many, high) = flops.items()
    each = (high - low) / (many - few)
    return (low - each * few) * scale + each * expected
