"""What a LightningModule offers to monitors: small parts in its `probes`, each with one of the protocols below.

A monitor gets a part by its protocol from `find_probe`; it skips a module without one.

Rows are prompt -> response rows. Every draw comes from the generator that is given, so that a measurement can be repeated.
"""

from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Generator, Tensor

from models.interfaces.probe_batch import Choices, EStep, ProbeBatch

Corruption = Literal["blank", "random"]
P = TypeVar("P")


def find_probe(module: Any, kind: type[P]) -> P | None:
    """The first part of `module.probes` that has the protocol, or None."""
    return next((part for part in getattr(module, "probes", ()) if isinstance(part, kind)), None)


@runtime_checkable
class TextProbe(Protocol):
    """Generates texts from a condition that can be exchanged between them: a plan, noise, a prompt."""

    def probe_batch(self, rows: dict[str, Tensor], generator: Generator) -> ProbeBatch:
        """Texts of the rows and their conditions."""

    def nll(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        """-log p(token given the condition and the tokens before it), nats, (B, R)."""

    def corrupt_condition(self, batch: ProbeBatch, how: Corruption, generator: Generator) -> dict[str, Tensor] | None:
        """A condition without information (`blank`), or a random one of the same length; None where there is no such thing."""

    def condition_features(self, batch: ProbeBatch) -> Tensor | None:
        """(B, F), near where conditions are alike; None where there is no such thing."""


@runtime_checkable
class ChoiceProbe(Protocol):
    """Chooses from distributions whose sharpness is monitored: concepts, tokens."""

    def choices(self, rows: dict[str, Tensor], generator: Generator) -> dict[str, Choices]:
        """By the name of who chooses."""


@runtime_checkable
class RelaxationProbe(Protocol):
    """Trains through relaxed choices. relaxation: embeddings mixed softly and chosen hard, (N, D) each, of the last step."""

    relaxation: tuple[Tensor, Tensor] | None


@runtime_checkable
class PlannerProbe(Protocol):
    """Learns which concepts to choose from what they are for."""

    def take_planner_gradient(self) -> Tensor | None:
        """Size of the gradient that reached the hidden states the training's plans are chosen from, since the last call, ().

        Mean over this rank's rows; 0 where none came, None where nothing was chosen with a gradient.
        """


@runtime_checkable
class SearchProbe(Protocol):
    """Searches better plans in some steps. e_step: what the last training step's search found, None where it made none."""

    e_step: EStep | None


@runtime_checkable
class ConceptProbe(TextProbe, Protocol):
    """Generates texts from plans of concepts in S slots.

    posterior_reads: `text` where a plan is a function of the text alone, else `all`. slot_names: of each slot, (S,).
    """

    posterior_reads: str
    slot_names: list[str]

    def concepts(self, rows: dict[str, Tensor]) -> Tensor:
        """The most probable choices (B, S), as the executor reads them."""

    def posterior_concepts(self, rows: dict[str, Tensor]) -> Tensor:
        """The most probable choices (B, S) of the posterior alone, whatever is known of the text."""


@runtime_checkable
class MixtureProbe(ConceptProbe, Protocol):
    """Knows the likelihood of a text as the sum over all plans, p(x | u) = sum_z p(z | u) p(x | z)."""

    def log_prob(self, rows: dict[str, Tensor]) -> Tensor | None:
        """log p(x | u) in nats, (B,) float64; None where there are too many plans."""

    def bound(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        """-log p(x | z) - log p(z | u) of the batch's own plans in nats, (B,), at least -log p(x | u)."""

    def given_attributes(self, batch: ProbeBatch, attributes: Tensor) -> dict[str, Tensor] | None:
        """The condition of plans that have the attributes (B, A) of the texts; None where types have several concepts."""


@runtime_checkable
class RebuildProbe(TextProbe, Protocol):
    """Reconstructs texts from plans, of which concepts can be hidden."""

    def predictions(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        """(B, 2, R): the most probable tokens, given the text's own before each (forced) or those generated (free)."""

    def rebuilt(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        """(B,) bool: texts that greedy decoding reconstructs from the condition alone."""

    def drop_concepts(self, batch: ProbeBatch, order: Tensor, share: float) -> dict[str, Tensor]:
        """The condition without the concepts whose order (B, S), uniform in [0, 1), lies below the share."""


class Denoised(NamedTuple):
    """A denoiser at noisy points of known texts: points (B, R, D) of the responses, logits (M, V), tokens (M,) of the texts."""

    points: Tensor
    logits: Tensor
    tokens: Tensor


@runtime_checkable
class FlowMapProbe(Protocol):
    """Generates texts from noise by a flow map. Times are data times, 1 = clean text."""

    def answer(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        """Responses (B, R) of fresh noise, in one forward pass."""

    def denoised(self, rows: dict[str, Tensor], time: float, generator: Generator) -> Denoised:
        """The denoiser at points of the rows' responses, all at one time."""

    def evidence(self, points: Tensor, time: float) -> Tensor:
        """log p(point | token) up to a constant, (B, R, D) -> (B, R, V) float64; time < 1. With the corpus this gives D."""

    def consistency_gap(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        """KL(two jumps by way of time 1/2 || one jump) from fresh noise to text, nats per position."""
