"""The shape of a training objective: a batch in, a sum of losses, a token count and each token's NLL out."""

from typing import NamedTuple, Protocol

from torch import Generator, Tensor, nn


class ObjectiveOutput(NamedTuple):
    """loss_sum: scalar, nats; tokens: how many tokens it counts (loss = loss_sum / tokens); position_nll (B, L)."""

    loss_sum: Tensor
    tokens: int
    position_nll: Tensor


class Terms(NamedTuple):
    """loss: scalar, what is minimised; raw: named scalars before any weighting, nats unless they say otherwise."""

    loss: Tensor
    raw: dict[str, Tensor]


def mean_of(values: Tensor) -> Tensor:
    """Mean over positions; 0 where there are none."""
    return values.sum() / max(1, values.numel())


class Objective(Protocol):
    def __call__(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> ObjectiveOutput: ...
