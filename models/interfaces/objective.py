"""The shape of a training objective: a batch in, a sum of losses, a token count and each token's NLL out."""

from typing import Literal, NamedTuple, Protocol

from torch import Generator, Tensor, nn

Likelihood = Literal["exact", "bound"]
Generation = Literal["masked", "autoregressive", "prefix", "flow"]


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


class TextObjective:
    """What an objective says of itself beside its loss. One with weights of its own is an `nn.Module` as well.

    likelihood: what the model's NLL of a text is: `exact`, an upper `bound`, or None where the objective defines none.
    loss_is_nll: the loss' `position_nll` is that NLL, or an unbiased draw of it, so that validation needs no more forwards.
    generation: how its model writes texts; None where it cannot.
    kinds_of_batch: more than 1 where a step's cost depends on a draw; it is then counted over so many.
    attention: what a model with fresh weights is given for it (model.attention=null).
    """

    likelihood: Likelihood | None = None
    loss_is_nll: bool = False
    generation: Generation | None = None
    kinds_of_batch: int = 1
    attention: Literal["causal", "bidirectional"] = "causal"

    def attach(self, model: nn.Module) -> None:
        """Called once with the model: refuse one that does not fit (UsageError) and make weights of its size."""

    def trained(self, model: nn.Module) -> nn.Module:
        """The network whose states are the result of the training."""
        return model

    def after_step(self, model: nn.Module) -> None:
        """Called after every optimizer step."""

    def text_nll(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        """NLL of the batch's texts by position, nats, (B, L); columns as in `align_with_columns`."""
        raise NotImplementedError
