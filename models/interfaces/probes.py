"""What a LightningModule offers to monitors: protocols, each small, each for itself; a module without one is passed over.

Rows are prompt -> response rows. Every draw comes from the generator that is given, so that a measurement can be repeated.
"""

from collections.abc import Iterable
from typing import Literal, Protocol, runtime_checkable

from torch import Generator, Tensor
from torch.nn import Parameter

from models.interfaces.probe_batch import Choices, EStep, Given

Spoiling = Literal["blank", "random"]


@runtime_checkable
class WritesFromCondition(Protocol):
    """Writes texts from something that can be exchanged between them: a plan, noise, a prompt."""

    def probe(self, rows: dict[str, Tensor], generator: Generator) -> Given:
        """Texts of the rows and what they are written from."""

    def probe_nll(self, rows: dict[str, Tensor], given: Given) -> Tensor:
        """-log p(token given the condition and the tokens before it), nats, (B, R)."""

    def probe_spoiled(self, given: Given, how: Spoiling, generator: Generator) -> dict[str, Tensor] | None:
        """A condition that says nothing (`blank`), or a random one of the same length; None where there is no such thing."""

    def probe_features(self, given: Given) -> Tensor | None:
        """(B, F), near where conditions are alike; None where there is no such thing."""


@runtime_checkable
class MakesChoices(Protocol):
    """Draws from distributions that are sharp or not: concepts, words."""

    def probe_choices(self, rows: dict[str, Tensor], generator: Generator) -> dict[str, Choices]:
        """By the name of who chooses."""


@runtime_checkable
class RelaxesChoices(Protocol):
    """Trains through relaxed choices. relaxation: embeddings mixed softly and chosen hard, (N, D) each, of the last step."""

    relaxation: tuple[Tensor, Tensor] | None


@runtime_checkable
class HasPlanner(Protocol):
    """Has weights that nothing but the planning uses."""

    def planner_parameters(self) -> Iterable[Parameter]: ...


@runtime_checkable
class SearchesPlans(Protocol):
    """Searches better plans now and then. e_step: what the last training step's search found, None where it made none."""

    e_step: EStep | None
