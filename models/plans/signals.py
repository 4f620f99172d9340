"""Signals: known properties y(x) of a text that types of a plan have to predict, so that each type has a known meaning.

Legend: B texts, K plans of a text, C columns of a plan's block, D width, S slots, W choices of a slot.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.causal_lm import output_head
from models.functional.errors import UsageError
from models.functional.precision import at_least_float32
from models.functional.rows import SignalWords, signals_of
from models.plans.unified import EMBEDDING_STD, UnifiedModel
from models.plans.vocabulary import SPECIAL, ConceptVocabulary

UNKNOWN = -1  # the value of a signal that a text does not have


class SignalHeads(nn.Module):
    """wanted: {type: signal}; sizes: {signal: how many values}. One linear layer a type, on the mean of its concepts.

    Errors: UsageError that names module.signals.<type>.
    """

    def __init__(self, model: UnifiedModel, wanted: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        super().__init__()
        require_signals(model.vocabulary, wanted, sizes)
        columns = model.layout.slot_columns
        self.columns = {name: columns[own] for name, own in _slots_of(model.vocabulary, wanted).items()}
        self.wanted = dict(wanted)
        table = model.new_embedding.weight
        make = {"device": table.device, "dtype": table.dtype}
        with torch.random.fork_rng(devices=[]):  # other draws of the run do not depend on these layers
            self.heads = nn.ModuleDict(
                {name: nn.Linear(table.shape[1], sizes[s], **make) for name, s in wanted.items()}
            )

    def log_prob(self, embeds: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """log p(y | z) in nats summed over types, (B,), from embedded blocks (B, C, D) and {signal: (B,)}; 0 where unknown."""
        total = embeds.new_zeros(len(embeds))
        for name, signal in self.wanted.items():
            log_p = self.heads[name](embeds[:, self.columns[name]].mean(1)).log_softmax(-1)
            total = total + _log_prob_of(log_p, signals[signal])
        return total


class SignalCodes:
    """Types whose codes are the values of their signal: the code of a text is known, and the posterior has to predict it.

    wanted: {type: signal}. Each type has one concept a text.
    """

    def __init__(self, vocabulary: ConceptVocabulary, wanted: Mapping[str, str]) -> None:
        self.vocabulary, self.wanted = vocabulary, dict(wanted)

    def require(self, sizes: Mapping[str, int]) -> None:
        """sizes: {signal: how many values}. Errors: UsageError where a type cannot hold the values of its signal."""
        require_signals(self.vocabulary, self.wanted, sizes)
        for t in self.vocabulary.types:
            if t.name in self.wanted and (t.most > 1 or t.codes < sizes[self.wanted[t.name]]):
                raise UsageError(
                    f"module.signal_codes needs module.types.{t.name}.most=1 and at least "
                    f"module.types.{t.name}.codes={sizes[self.wanted[t.name]]}, the values of {self.wanted[t.name]}"
                )

    def require_known(self, rows: Mapping[str, Any]) -> None:
        """rows: {split: rows with `columns`}. Errors: UsageError where a text does not have a signal."""
        for split, own in rows.items():
            values = signals_of(own.columns)
            for name, signal in self.wanted.items():
                if bool((values[signal] == UNKNOWN).any()):
                    raise UsageError(
                        f"module.weights.signals=0 takes every plan from what is known of its text, and {signal} (type {name}) "
                        f"is not known of all texts of the {split} split; type for example module.weights.signals=0.1"
                    )

    def codes(self, signals: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The known code (B,) of each slot that has a signal, UNKNOWN where a text does not have it."""
        slots = _slots_of(self.vocabulary, self.wanted)
        return {own.start: signals[self.wanted[name]] for name, own in slots.items()}

    def log_prob(self, log_q: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """log q of the known codes in nats summed over slots, (B,), from log-probabilities of choices (B, S, W)."""
        total = log_q.new_zeros(len(log_q))
        for slot, value in self.codes(signals).items():
            total = total + _log_prob_of(log_q[:, slot, 1:], value)
        return total


@torch.no_grad()
def start_as_words(
    model: UnifiedModel, wanted: Mapping[str, str], words: Mapping[str, SignalWords], special: Mapping[str, list[int]]
) -> None:
    """A plan begins as what a pretrained backbone knows of its words: a list of names and values.

    wanted: {type: signal} of a model with `NamedCodes` for these types. words: {signal: its words}. special: token ids for
    names in `vocabulary.SPECIAL`. Embeddings of codes, of the separator before them and of special ids become the mean input
    embedding of their tokens. The weights with which a code is chosen become the mean of the output layer's, 0 for a code
    without words. Embeddings of other new ids become as large as the backbone's own tokens, and those of types 0.
    """
    assert model.quantiser is not None
    read, write, v = model.backbone.get_input_embeddings().weight, output_head(model.backbone).weight, model.vocabulary
    model.new_embedding.weight.div_(EMBEDDING_STD)
    model.type_embedding.weight.zero_()
    for name, tokens in special.items():
        if tokens:
            model.new_embedding.weight[SPECIAL.index(name)] = _mean_row(read, tokens)
    for k, t in enumerate(v.types):
        if t.name not in wanted:
            continue
        signal = wanted[t.name]
        space, first = model.quantiser.spaces[k], v.codes(k).start - v.base
        space.rows.weight.div_(EMBEDDING_STD)
        space.head.weight[: t.codes] = model.new_head.weight[first : first + t.codes] = 0.0
        for code, tokens in enumerate(words[signal].values):
            if tokens:
                space.rows.weight[code] = _mean_row(read, tokens)
                space.head.weight[code] = model.new_head.weight[first + code] = _mean_row(write, tokens)
        model.new_embedding.weight[v.separator(k) - v.base] = _mean_row(read, words[signal].name)


def _mean_row(table: Tensor, ids: Sequence[int]) -> Tensor:
    """The mean (D,) of rows of a table (V, D), at least float32."""
    return at_least_float32(table[torch.tensor(ids, device=table.device)]).mean(0)


def require_signals(vocabulary: ConceptVocabulary, wanted: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Errors: UsageError that names module.signals.<type> where the type or its signal is not known."""
    names = [t.name for t in vocabulary.types]
    for name, signal in wanted.items():
        if name not in names:
            raise UsageError(f"module.signals.{name} is no type; the types are {', '.join(names)}")
        if signal not in sizes:
            raise UsageError(f"module.signals.{name}={signal} is not known; the corpus' signals are {', '.join(sizes)}")


def _slots_of(vocabulary: ConceptVocabulary, wanted: Mapping[str, str]) -> dict[str, slice]:
    """The slots of each type that has a signal."""
    pairs = zip(vocabulary.types, vocabulary.type_slots, strict=True)
    return {t.name: own for t, own in pairs if t.name in wanted}


def _log_prob_of(log_p: Tensor, values: Tensor) -> Tensor:
    """log p (B, V) of values (B,), 0 where one is UNKNOWN; (B,)."""
    found = log_p.gather(-1, values.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(values == UNKNOWN, 0.0)


def log_prob_of_plans(heads: SignalHeads, embeds: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
    """log p(y | z) of K plans of each text, (B, K), from embedded blocks (B, K, C, D) and {signal: (B,)}."""
    count = embeds.shape[1]
    repeated = {name: torch.repeat_interleave(value, count, 0) for name, value in signals.items()}
    return heads.log_prob(embeds.flatten(0, 1), repeated).view(embeds.shape[:2])
