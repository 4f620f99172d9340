"""Typed vocabularies of concepts, beside the base vocabulary of the text: one space of ids for both.

Ids below `base` are text. From there on: <BOS>, <PLAN>, <TEXT>, <BLANK>, <EOS>, <PAD>, one <SEP_i> a type, each type's codes.
The output layer of the text ends before `base`, so that a concept can never be generated as text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from models.functional.errors import UsageError
from models.functional.plan_information import nominal_bits

SPECIAL = ("<BOS>", "<PLAN>", "<TEXT>", "<BLANK>", "<EOS>", "<PAD>")
IMPOSSIBLE = -1e9  # a logit that no draw takes; finite, so that the difference of two is finite
END = 0  # the choice that ends a type's sequence; choice k > 0 is code k - 1


@dataclass(frozen=True)
class ConceptType:
    """A vocabulary of `codes` concepts. A plan has at least `least` and at most `most` of them."""

    name: str
    codes: int
    least: int
    most: int


class ConceptVocabulary:
    """types: {name: {"codes", "most", "least" (None is `most`)}}, in the order in which they are planned; None is no type.

    Errors: UsageError that names module.types.<name>.<option>.
    """

    def __init__(self, types: Mapping[str, Mapping[str, int | None] | None], base: int) -> None:
        given = {name: options for name, options in types.items() if options is not None}
        if not given:
            raise UsageError("module.types names no type; type for example '+module.types.a={codes: 8, most: 1}'")
        self.types = tuple(_checked(name, dict(options)) for name, options in given.items())
        self.base = base
        self.bos, self.plan, self.text, self.blank, self.eos, self.pad = range(base, base + len(SPECIAL))

    @property
    def new(self) -> int:
        """How many ids there are beside the text's."""
        return len(SPECIAL) + len(self.types) + sum(t.codes for t in self.types)

    def separator(self, k: int) -> int:
        """The id of <SEP_{k+1}>, which opens type k."""
        return self.base + len(SPECIAL) + k

    def codes(self, k: int) -> range:
        """The ids of type k's codes."""
        first = self.separator(len(self.types)) + sum(t.codes for t in self.types[:k])
        return range(first, first + self.types[k].codes)

    @property
    def nominal_bits(self) -> float:
        """R_nom: log2 of the number of plans."""
        return nominal_bits((t.codes, t.least, t.most) for t in self.types)

    # -- slots: the positions at which a concept is chosen, type after type ---------------------------------------------

    @cached_property
    def slot_types(self) -> Tensor:
        """The type of each slot, (S,)."""
        return torch.tensor([k for k, t in enumerate(self.types) for _ in range(t.most)])

    @property
    def slot_codes(self) -> Tensor:
        """The number of codes of each slot, (S,)."""
        return torch.tensor([self.types[k].codes for k in self.slot_types.tolist()])

    @property
    def type_slots(self) -> list[slice]:
        """The slots of each type."""
        first, found = 0, []
        for t in self.types:
            found.append(slice(first, first + t.most))
            first += t.most
        return found

    @cached_property
    def choices(self) -> Tensor:
        """The id behind each choice of each type, (types, W): <EOS>, the codes, then <PAD> where a type has fewer."""
        rows = torch.full((len(self.types), 1 + max(t.codes for t in self.types)), self.pad)
        for k, t in enumerate(self.types):
            rows[k, END], rows[k, 1 : 1 + t.codes] = self.eos, torch.tensor(self.codes(k))
        return rows

    @cached_property
    def possible(self) -> Tensor:
        """Choices that each slot allows while its type is open, (S, W) bool: no <EOS> before `least` concepts."""
        rows = (self.choices != self.pad)[self.slot_types]
        early = [position < t.least for t in self.types for position in range(t.most)]
        rows[:, END] = ~torch.tensor(early)
        return rows

    def names(self) -> list[str]:
        """The names of the new ids, in their order."""
        separators = [f"<SEP_{k + 1}>" for k in range(len(self.types))]
        return [*SPECIAL, *separators, *(f"<{t.name}:{code}>" for t in self.types for code in range(t.codes))]


def _checked(name: str, options: dict[str, int | None]) -> ConceptType:
    where = f"module.types.{name}"
    if unknown := set(options) - {"codes", "least", "most"}:
        raise UsageError(f"{where}.{min(unknown)} is not known; the options are codes, most and least")
    codes, most = options.get("codes"), options.get("most", 1)
    least = most if options.get("least") is None else options["least"]
    if codes is None or codes < 2:
        raise UsageError(f"{where}.codes={codes} must be at least 2")
    if most is None or least is None or most < 1 or not 0 <= least <= most:
        raise UsageError(f"{where} needs most of at least 1 and least from 0 to most, not most={most} least={least}")
    return ConceptType(name, codes, least, most)
