"""What forward passes of two models, and of a third that drafts, cost: the best draft length depends on it.

Legend: B batch, L columns.
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.interfaces.scores import ProposesBlocks
from models.speculative.cached_scores import CachedScores
from models.speculative.decode import keep_states, one_round
from models.speculative.distribution import MixtureDist
from models.speculative.options import Draft, DraftOptions, Verify
from models.speculative.random_source import TorchRandomSource
from models.speculative.roles import roles
from models.speculative.state import QStarRun, Scores, TextRules

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
    theta: nn.Module,
    target: nn.Module,
    input_ids: Tensor,
    assistant: Any = None,
    repeats: int = 5,
    *,
    mixture: MixtureDist | None = None,
    verify: Verify = "token",
    vocab_size: int | None = None,
) -> ForwardCosts:
    """Times forward passes of one and of five positions behind cached prompts input_ids (B, L), the batch to be decoded.

    position_cost is that of the slower of theta and target. assistant: a third model, or any source of scores. For a drafter of
    blocks whole rounds are timed, with q*, draws and bookkeeping, which take a share of the time where models are small: k
    tokens of a draft take c + k w rounds without a draft beside one such round; c and w are of drafts of one token and of a
    whole block. mixture, verify, vocab_size: of these rounds. One model as theta and target counts once.
    Measured times differ from run to run. Draft lengths that follow them change the texts of a seed, never their distribution.
    """
    if isinstance(assistant, ProposesBlocks):
        scores = [_scores(model, vocab_size) for model in ((theta,) if target is theta else (theta, target))]
        rounds = QStarRounds(scores, input_ids, assistant, mixture or MixtureDist(), verify)
        return _block_costs(rounds, assistant.block_length, repeats)
    one = {name: _seconds(model, input_ids, 1, repeats) for name, model in (("theta", theta), ("target", target))}
    cost = one["theta"] / one["target"]
    if assistant is not None:
        cost = _seconds(assistant, input_ids, 1, repeats) / sum(one.values())
    slower = max(one, key=lambda name: one[name])
    more = _seconds({"theta": theta, "target": target}[slower], input_ids, POSITIONS, repeats)
    return ForwardCosts(cost, max(0.0, more / one[slower] - 1) / (POSITIONS - 1))


class QStarRounds:
    """Rounds of decoding behind prompts input_ids (B, L), each from the same position.

    scores: of theta, or of theta and target.
    """

    def __init__(
        self, scores: list[Scores], input_ids: Tensor, drafter: ProposesBlocks, mixture: MixtureDist, verify: Verify
    ) -> None:
        models: dict[str, Any] = dict(zip(("theta", "target"), scores, strict=False)) | {"block_drafter": drafter}
        keep_states(models, drafter)
        self.drafting = DraftOptions("block_drafter", drafter.block_length, verify)
        self.who = roles(self.drafting)
        if len(scores) == 1:
            self.who = self.who.of_one_model()
        size, device = drafter.block_length, input_ids.device
        lengths = torch.full((len(input_ids),), input_ids.shape[1], device=device)
        self.run = QStarRun(
            models, input_ids, lengths, rules=TextRules(size + 2), draft_columns=size + 2, mixture=mixture,
            rng=TorchRandomSource(torch.Generator(device).manual_seed(0)), shared_noise=verify == "shared_noise",
        )  # fmt: skip
        one_round(self.run, None, 0, self.drafting, self.who)  # the prompt is read
        self.lengths = self.run.lengths

    def __call__(self, size: int) -> None:
        """One with a draft of `size` tokens, or with none."""
        self.run.lengths = self.lengths
        one_round(self.run, None, size, self.drafting, self.who)


def _block_costs(rounds: QStarRounds, longest: int, repeats: int) -> ForwardCosts:
    """The costs of a round by its draft length, in rounds without a draft."""
    device = rounds.run.ids.device
    none, one, whole = (_least_seconds(partial(rounds, size), device, repeats) for size in (0, 1, longest))
    each = max(0.0, whole - one) / max(1, longest - 1)
    return ForwardCosts(max(LEAST_COST, (one - each) / none - 1), each / none)


def _scores(model: Any, vocab_size: int | None = None) -> Scores:
    return CachedScores(model, vocab_size) if isinstance(model, nn.Module) else model


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
        scores = _scores(model)
        scores(ids, length, 1)
        start = _now(ids.device)
        scores(ids, length + 1, positions)
        seconds.append(_now(ids.device) - start)
    return min(seconds[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
