"""What forward passes of two models, and of a third that drafts, cost: the best draft length depends on it.

Legend: B batch, L columns.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.interfaces.scores import ProposesBlocks
from models.speculative.cached_scores import CachedScores
from models.speculative.options import Draft
from models.speculative.random_source import TorchRandomSource

LEAST_COST = 1e-3  # of a drafter whose pass is too fast to be told from the spread of its verifiers
POSITIONS = 5  # of the longer of the two forward passes that are timed


class ForwardCosts(NamedTuple):
    """The two costs of `DraftOptions`."""

    cost: float
    position_cost: float


def parameter_cost(theta: nn.Module, target: nn.Module, draft: Draft, assistant: Any = None) -> float:
    """The cost of `DraftOptions` if the time of a forward pass were that of its parameters: the same in every run.

    assistant: a third model, or any source of scores, which then counts as one parameter. One model as both counts once.
    """
    ours, theirs = _parameters(theta), _parameters(target)
    if draft not in ("assistant", "block_drafter"):
        return ours / theirs
    both = ours if target is theta else ours + theirs
    # a block drafter shares the embedding and the head of a verifier; its head is what it computes of them
    own = getattr(assistant, "parameters_read", None) or _parameters(assistant)
    return max(1, own) / both


def _parameters(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters()) if isinstance(model, nn.Module) else 0


def forward_costs(
    theta: nn.Module, target: nn.Module, input_ids: Tensor, assistant: Any = None, repeats: int = 5
) -> ForwardCosts:
    """Times forward passes of one and of five positions behind cached prompts input_ids (B, L), the batch to be decoded.

    position_cost is that of the slower of theta and target. assistant: a third model, or any source of scores. For a drafter of
    blocks, k tokens of a draft take c + k w forward passes of both models beside the one over a single position: c and w are of
    drafts of one token and of a whole block, and their verification. One model as theta and target counts once.
    Measured times differ from run to run. Draft lengths that follow them change the texts of a seed, never their distribution.
    """
    one = {name: _seconds(model, input_ids, 1, repeats) for name, model in (("theta", theta), ("target", target))}
    cost = one["theta"] / one["target"]
    if isinstance(assistant, ProposesBlocks):
        return _block_costs({"theta": theta, "target": target}, input_ids, assistant, repeats)
    if assistant is not None:
        cost = _seconds(assistant, input_ids, 1, repeats) / sum(one.values())
    slower = max(one, key=lambda name: one[name])
    more = _seconds({"theta": theta, "target": target}[slower], input_ids, POSITIONS, repeats)
    return ForwardCosts(cost, max(0.0, more / one[slower] - 1) / (POSITIONS - 1))


def _block_costs(models: dict[str, Any], input_ids: Tensor, drafter: Any, repeats: int) -> ForwardCosts:
    """The costs of a round by its draft length: the drafter's block, and the positions that are verified."""
    alone = models["theta"] is models["target"]
    verifiers = {"theta": models["theta"]} if alone else models
    longest = drafter.block_length
    one = sum(_seconds(model, input_ids, 1, repeats) for model in verifiers.values())
    rounds = [
        sum(_seconds(model, input_ids, size + 1, repeats) for model in verifiers.values())
        + _drafting_seconds(verifiers, input_ids, drafter, size, repeats)
        for size in (1, longest)
    ]
    each = max(0.0, rounds[1] - rounds[0]) / max(1, longest - 1)
    return ForwardCosts(max(LEAST_COST, (rounds[0] - each) / one - 1), each / one)


def _drafting_seconds(verifiers: dict[str, Any], input_ids: Tensor, drafter: Any, size: int, repeats: int) -> float:
    """Least seconds of a draft of `size` tokens."""
    ends = torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)
    found = []
    for name, layers in drafter.state_layers.items():
        scores = CachedScores(verifiers[name])
        scores.keep_states(layers)
        scores(input_ids, ends + 1, 1)
        found.append(scores.states_before(input_ids, ends, drafter.window))
    states, read = torch.cat([part for part, _ in found], -1), torch.stack([part for _, part in found]).all(0)
    draws = TorchRandomSource(torch.Generator(input_ids.device).manual_seed(0))
    return _least_seconds(
        lambda: drafter.propose(states, read, input_ids[:, -1], size, draws, lambda logp: logp),
        input_ids.device,
        repeats,
    )


def _least_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Of several calls after a first one: other work on the machine only ever lengthens a call."""
    seconds = []
    for _ in range(repeats + 1):
        start = _now(device)
        run()
        seconds.append(_now(device) - start)
    return min(seconds[1:])


def _seconds(model: Any, input_ids: Tensor, positions: int, repeats: int) -> float:
    """Least seconds of a call that reads `positions` new tokens."""
    ids = torch.cat([input_ids, input_ids[:, -1:].repeat(1, positions)], -1)
    length = torch.full((len(ids),), input_ids.shape[1], device=ids.device)
    seconds = []
    for _ in range(repeats + 1):
        scores: Callable = CachedScores(model) if isinstance(model, nn.Module) else model
        scores(ids, length, 1)
        start = _now(ids.device)
        scores(ids, length + 1, positions)
        seconds.append(_now(ids.device) - start)
    return min(seconds[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
