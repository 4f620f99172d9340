"""What training objectives return, and what they declare of themselves."""

from typing import Literal, NamedTuple, Protocol

from torch import Generator, Tensor, nn

Likelihood = Literal["exact", "bound"]
Generation = Literal["masked", "autoregressive", "prefix", "flow"]


class Terms(NamedTuple):
    """What an objective makes of a batch. Legend: B batch, L columns.

    loss: scalar, what is minimised; a mean over the batch.
    raw: named scalars before any weighting, in nats unless the objective documents another unit.
    tokens: over how many tokens `loss` is a mean. Micro-batches and ranks then weigh as many tokens as they have; None: all
        of them weigh alike.
    position_nll: the loss of each position, (B, L) nats, 0 where nothing is scored; None where there is no such thing.
    """

    loss: Tensor
    raw: dict[str, Tensor]
    tokens: int | None = None
    position_nll: Tensor | None = None

    @classmethod
    def over_tokens(cls, loss_sum: Tensor, tokens: int, position_nll: Tensor, **raw: Tensor) -> "Terms":
        """The mean of a summed loss (scalar, nats) over `tokens`; 0 tokens have the loss 0."""
        return cls(loss_sum / max(1, tokens), raw, tokens, position_nll)

    @property
    def weight(self) -> int:
        """What the batch weighs beside other micro-batches: its tokens, or 1 where they are not counted."""
        return 1 if self.tokens is None else self.tokens


def mean_of(values: Tensor) -> Tensor:
    """Mean over positions; 0 where there are none."""
    return values.sum() / max(1, values.numel())


class Objective(Protocol):
    """Any callable of this form. One that is no `TextObjective` is trained by its loss alone."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Terms:
        """The loss of a batch; every random draw comes from the generator."""
        ...


class TextObjective:
    """What an objective declares beside its loss. One with weights of its own is an `nn.Module` as well.

    likelihood: what the model's NLL of a text is: `exact`, an upper `bound`, or None where the objective defines none.
    generation: how its model generates texts; None where it cannot.
    kinds_of_batch: over how many draws the cost of a step is averaged where `expected_predictions` is None.
    attention: of a model with fresh weights (model.attention=null).
    """

    likelihood: Likelihood | None = None
    generation: Generation | None = None
    kinds_of_batch: int = 1
    attention: Literal["causal", "bidirectional"] = "causal"

    def attach(self, model: nn.Module) -> None:
        """Called once with the model: refuse one that does not fit (UsageError) and make weights of its size."""

    def loss_is_nll(self, batch: dict[str, Tensor]) -> bool:
        """Whether the loss' `position_nll` is `text_nll` of this batch, or an unbiased draw of it.

        Validation then needs no further forward passes.
        """
        return False

    def expected_predictions(self, batch: dict[str, Tensor]) -> float | None:
        """For how many positions of the batch the loss computes logits on average over draws; None where none are drawn.

        A draw whose cost is otherwise that of every other has its own number as `raw["predictions"]`.
        """
        return None

    def trained(self, model: nn.Module) -> nn.Module:
        """The network whose hidden states are the result of the training."""
        return model

    def before_step(self, share: float) -> None:
        """Called before every training step with the share of the training that is done, 0 to 1."""

    def after_step(self, model: nn.Module) -> None:
        """Called after every optimizer step."""

    def text_nll(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        """NLL of the batch's scored tokens (`token_counts` of them) by position, (B, L) nats, 0 elsewhere.

        Columns are those of `labels` for packed rows, and those of `input_ids` for prompt -> response rows.
        """
        raise NotImplementedError
