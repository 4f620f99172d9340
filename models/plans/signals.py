"""What a text tells, read off its plan: each type has to predict a signal y(x) of its own, so that it is about something.

Legend: B texts, C columns of a plan's block, D width, N texts of any arrangement.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.functional.errors import UsageError
from models.plans.terms import slots_of
from models.plans.unified import UnifiedModel
from models.plans.vocabulary import ConceptVocabulary

UNKNOWN = -1  # a signal that a text does not give


class SignalHeads(nn.Module):
    """wanted: {type: signal}; sizes: {signal: how many values}. One linear layer a type, on the mean of its concepts.

    Errors: UsageError that names module.signals.<type>.
    """

    def __init__(self, model: UnifiedModel, wanted: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        super().__init__()
        columns = model.layout.slot_columns
        self.columns = {kind: columns[own] for kind, own in _slots_of(model.vocabulary, wanted, sizes).items()}
        self.wanted = dict(wanted)
        table = model.new_embedding.weight
        make = {"device": table.device, "dtype": table.dtype}
        with torch.random.fork_rng(devices=[]):  # what else is drawn does not depend on them
            self.heads = nn.ModuleDict(
                {kind: nn.Linear(table.shape[1], sizes[s], **make) for kind, s in wanted.items()}
            )

    def log_prob(self, embeds: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """log p(y | z) in nats summed over types, (N,), from embedded blocks (N, C, D) and {signal: (N,)}; 0 where unknown."""
        total = embeds.new_zeros(len(embeds))
        for kind, signal in self.wanted.items():
            logits = self.heads[kind](embeds[:, self.columns[kind]].mean(1)).log_softmax(-1)
            value = signals[signal]
            told = logits.gather(-1, value.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            total = total + told.masked_fill(value == UNKNOWN, 0.0)
        return total


class SignalCodes:
    """A type's codes are the values of its signal: which concept a text has is known, and the posterior has to say it.

    Arguments as of `SignalHeads`; each type names one concept a text, of at least as many codes as its signal has values.
    """

    def __init__(self, vocabulary: ConceptVocabulary, wanted: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        slots = _slots_of(vocabulary, wanted, sizes)
        for t in vocabulary.types:
            if t.name in wanted and (t.most > 1 or t.codes < sizes[wanted[t.name]]):
                raise UsageError(
                    f"module.signal_codes needs module.types.{t.name}.most=1 and at least "
                    f"module.types.{t.name}.codes={sizes[wanted[t.name]]}, the values of {wanted[t.name]}"
                )
        self.wanted = {own.start: wanted[kind] for kind, own in slots.items()}

    def numbers(self, signals: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The code (B,) of each slot that is told, UNKNOWN where its text does not give it."""
        return {slot: signals[signal] for slot, signal in self.wanted.items()}

    def log_prob(self, log_q: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """log q of these codes in nats summed over slots, (B,), from log-probabilities of choices (B, S, W)."""
        total = log_q.new_zeros(len(log_q))
        for slot, value in self.numbers(signals).items():
            told = log_q[:, slot].gather(-1, 1 + value.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            total = total + told.masked_fill(value == UNKNOWN, 0.0)
        return total


def _slots_of(vocabulary: ConceptVocabulary, wanted: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, slice]:
    """The slots of each type that has a signal."""
    slots = dict(zip([t.name for t in vocabulary.types], slots_of(vocabulary), strict=True))
    for kind, signal in wanted.items():
        if kind not in slots:
            raise UsageError(f"module.signals.{kind} is no type; the types are {', '.join(slots)}")
        if signal not in sizes:
            raise UsageError(f"module.signals.{kind}={signal} is not known; the corpus' signals are {', '.join(sizes)}")
    return {kind: own for kind, own in slots.items() if kind in wanted}


def repeated(signals: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Each text's signals `count` times, one after the other."""
    return {name: torch.repeat_interleave(value, count, 0) for name, value in signals.items()}
