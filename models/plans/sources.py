"""Where the plan of a text comes from: a posterior that draws it, a posterior that quantises it, or a fixed code of the text.

Legend: B batch, R response columns, S slots, V vocabulary.
"""

from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Generator, Tensor

from models.functional.errors import require_choice
from models.functional.fixed_codes import leading_tokens, random_hash, surprising_tokens, unigram_surprisal
from models.functional.rows import signals_of
from models.plans.planner import Coder, Plan, Planner, greedy, relaxed
from models.plans.quantiser import Quantiser
from models.plans.rows import PosteriorReads, posterior_input, response_of
from models.plans.signals import SignalCodes

Points = dict[int, Tensor]  # of each slot, (B, d): what a quantiser's codes follow
Code = Literal["leading", "surprisal", "hash"]


class StepValues(NamedTuple):
    """What changes with the steps of a training.

    temperature, noise: of the relaxed draw. code_share: how far what is read has moved from the point to its code.
    hidden: how much the executor's training hides (`PlanOptions.hidden`). weights: of the losses.
    """

    temperature: float
    noise: float
    code_share: float
    hidden: float
    weights: dict[str, float]


class PlanSource(Protocol):
    """is_random: whether `draw` draws; else `most_probable` is all there is to measure.

    is_learned: whether a posterior chooses.
    """

    is_random: bool
    is_learned: bool

    def draw(self, batch: dict[str, Tensor], now: StepValues, generator: Generator) -> tuple[Plan, Points]:
        """A plan of each text to train on, with a gradient to what made it, and the points that codes have to follow."""

    def most_probable(self, batch: dict[str, Tensor]) -> Plan:
        """The plan that the executor reads where nothing is drawn."""

    def without_signals(self, batch: dict[str, Tensor]) -> Plan:
        """The same from what the source reads alone, whatever codes the corpus knows."""


class SampledPlans:
    """z ~ q(z | u, x), straight through a relaxed draw."""

    is_random = True
    is_learned = True

    def __init__(self, posterior: Planner, reads: PosteriorReads) -> None:
        self.posterior, self.reads = posterior, reads

    def draw(self, batch: dict[str, Tensor], now: StepValues, generator: Generator) -> tuple[Plan, Points]:
        choose = relaxed(generator, now.temperature, now.noise)
        return self.posterior.draw(*posterior_input(batch, self.reads), choose), {}

    def most_probable(self, batch: dict[str, Tensor]) -> Plan:
        return self.posterior.draw(*posterior_input(batch, self.reads), greedy)

    def without_signals(self, batch: dict[str, Tensor]) -> Plan:
        return self.most_probable(batch)


class QuantisedPlans:
    """The codes of the posterior's points.

    signal_codes: types whose codes are values of signals. A known value is taken instead of the predicted one, so that
    executor and prior never learn from a wrong one.
    """

    is_random = False
    is_learned = True

    def __init__(
        self,
        posterior: Planner,
        reads: PosteriorReads,
        quantiser: Quantiser,
        signal_codes: SignalCodes | None = None,
    ) -> None:
        self.posterior, self.reads, self.quantiser, self.signal_codes = posterior, reads, quantiser, signal_codes

    def draw(self, batch: dict[str, Tensor], now: StepValues, generator: Generator) -> tuple[Plan, Points]:
        coder = Coder(self.quantiser, now.code_share, self._known_codes(batch))
        plan = self.posterior.draw(*posterior_input(batch, self.reads), coder)
        return plan, coder.points if self.quantiser.moving else {}

    def most_probable(self, batch: dict[str, Tensor]) -> Plan:
        coder = Coder(self.quantiser, numbers=self._known_codes(batch))
        return self.posterior.draw(*posterior_input(batch, self.reads), coder)

    def without_signals(self, batch: dict[str, Tensor]) -> Plan:
        return self.posterior.draw(*posterior_input(batch, self.reads), Coder(self.quantiser))

    def _known_codes(self, batch: dict[str, Tensor]) -> dict[int, Tensor]:
        return {} if self.signal_codes is None else self.signal_codes.codes(signals_of(batch))


class KnownPlans:
    """The codes of a text's signals, of which every type has one. Nothing is read of the text, and no posterior learns."""

    is_random = False
    is_learned = False

    def __init__(self, planner: Planner, signal_codes: SignalCodes) -> None:
        self.planner, self.signal_codes = planner, signal_codes

    def most_probable(self, batch: dict[str, Tensor]) -> Plan:
        codes = self.signal_codes.codes(signals_of(batch))
        return self.planner.certain(torch.stack([1 + codes[slot] for slot in range(len(codes))], -1))

    def draw(self, batch: dict[str, Tensor], now: StepValues, generator: Generator) -> tuple[Plan, Points]:
        return self.most_probable(batch), {}

    def without_signals(self, batch: dict[str, Tensor]) -> Plan:
        return self.most_probable(batch)


class FixedPlans:
    """A code of the text that is not learned.

    leading: the first `tokens` tokens of the text. surprisal: the `tokens` tokens that are rarest in the training texts, in
    reading order. hash: a random code of the whole text.
    """

    is_random = False
    is_learned = False

    def __init__(self, planner: Planner, code: Code, tokens: int) -> None:
        require_choice("module.code", code, get_args(Code))
        self.planner, self.code, self.tokens = planner, code, tokens
        self.surprisal: Tensor | None = None

    def fit(self, texts: Tensor) -> None:
        """Learn from the training texts (N, R) how rare each token is, (V,)."""
        self.surprisal = unigram_surprisal(texts, self.planner.layout.vocabulary.base)

    def choices(self, batch: dict[str, Tensor]) -> Tensor:
        """Choices (B, S): the code of each text, counted from 1."""
        text = response_of(batch)
        if self.code == "leading":
            return 1 + leading_tokens(text, self.tokens)
        if self.code == "surprisal":
            assert self.surprisal is not None, "call fit first"
            return 1 + surprising_tokens(text, self.surprisal.to(text.device), self.tokens)
        return 1 + random_hash(text, self.planner.layout.vocabulary.slot_codes)

    def draw(self, batch: dict[str, Tensor], now: StepValues, generator: Generator) -> tuple[Plan, Points]:
        return self.most_probable(batch), {}

    def most_probable(self, batch: dict[str, Tensor]) -> Plan:
        return self.planner.certain(self.choices(batch))

    def without_signals(self, batch: dict[str, Tensor]) -> Plan:
        return self.most_probable(batch)
