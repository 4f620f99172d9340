"""What forwards of two models, and of a third that drafts, really cost here: what the best draft length depends on.

Legend: B batch, L columns.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.speculative.cached_scores import CachedScores

# places of the longer of the two forwards that are timed
PLACES = 5


class ForwardCosts(NamedTuple):
    """cost: seconds of a forward of theta over one of target, or of a third model's over both. wide: what each further place
    adds to a forward of the slower model, as a share of it."""

    cost: float
    wide: float


def forward_costs(
    theta: nn.Module, target: nn.Module, input_ids: Tensor, assistant: Any = None, repeats: int = 5
) -> ForwardCosts:
    """Times one-place and five-place forwards behind cached prompts input_ids (B, L), the batch that is to be decoded.

    assistant: a third model, or any source of scores. Figures of a clock: draft lengths that follow them differ from run to
    run, and with them the texts of a seed, but never their law.
    """
    one = {name: _seconds(model, input_ids, 1, repeats) for name, model in (("theta", theta), ("target", target))}
    cost = one["theta"] / one["target"]
    if assistant is not None:
        cost = _seconds(assistant, input_ids, 1, repeats) / sum(one.values())
    slower = max(one, key=one.get)
    more = _seconds({"theta": theta, "target": target}[slower], input_ids, PLACES, repeats)
    return ForwardCosts(cost, max(0.0, more / one[slower] - 1) / (PLACES - 1))


def _seconds(model: Any, input_ids: Tensor, places: int, repeats: int) -> float:
    """Median seconds of a call that reads `places` new ones."""
    ids = torch.cat([input_ids, input_ids[:, -1:].repeat(1, PLACES)], -1)
    length = torch.full((len(ids),), input_ids.shape[1], device=ids.device)
    seconds = []
    for _ in range(repeats + 1):
        scores: Callable = CachedScores(model) if isinstance(model, nn.Module) else model
        scores(ids, length, 1)
        start = _now(ids.device)
        scores(ids, length + 1, places)
        seconds.append(_now(ids.device) - start)
    return median(seconds[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
