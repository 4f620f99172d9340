"""Typed vocabularies of concepts, beside the base vocabulary of the text: one space of ids for both.

Ids below `base` are text. From there on: <BOS>, <PLAN>, <TEXT>, <BLANK>, <EOS>, <PAD>, one <SEP_i> a type, each type's codes.
A type of several levels has codes of each, and a concept of it is one code a level, coarse to fine (residual quantisation).
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
    """A vocabulary of concepts, one of `codes` codes at each of `levels`. A plan has `least` to `most` of these concepts."""

    name: str
    codes: int
    least: int
    most: int
    levels: int = 1

    @property
    def slots(self) -> int:
        """The number of choices: the levels of a concept come one after the other, then those of the next concept."""
        return self.most * self.levels


class ConceptVocabulary:
    """types: {name: {"codes", "most", "least" (None is `most`), "levels" (1)}} in planning order; None is no type.

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
        return len(SPECIAL) + len(self.types) + sum(t.codes * t.levels for t in self.types)

    def separator(self, k: int) -> int:
        """The id of <SEP_{k+1}>, which opens type k."""
        return self.base + len(SPECIAL) + k

    def codes(self, k: int) -> range:
        """The ids of type k's codes, level after level."""
        first = self.separator(len(self.types)) + sum(t.codes * t.levels for t in self.types[:k])
        return range(first, first + self.types[k].codes * self.types[k].levels)

    @property
    def nominal_bits(self) -> float:
        """R_nom: log2 of the number of plans."""
        return nominal_bits((t.codes**t.levels, t.least, t.most) for t in self.types)

    # -- slots: the positions at which a code is chosen, type after type, concept after concept, level after level --------

    @cached_property
    def slot_types(self) -> Tensor:
        """The type of each slot, (S,)."""
        return torch.tensor([k for k, t in enumerate(self.types) for _ in range(t.slots)])

    @cached_property
    def slot_levels(self) -> Tensor:
        """The level of each slot, 0 for the coarse one, (S,)."""
        return torch.tensor([level for t in self.types for _ in range(t.most) for level in range(t.levels)])

    @property
    def slot_codes(self) -> Tensor:
        """The number of codes of each slot, (S,)."""
        return torch.tensor([self.types[k].codes for k in self.slot_types.tolist()])

    @property
    def type_slots(self) -> list[slice]:
        """The slots of each type."""
        first, found = 0, []
        for t in self.types:
            found.append(slice(first, first + t.slots))
            first += t.slots
        return found

    @property
    def level_slots(self) -> list[list[slice]]:
        """The slots of each level of each type."""
        pairs = zip(self.types, self.type_slots, strict=True)
        return [[slice(own.start + level, own.stop, t.levels) for level in range(t.levels)] for t, own in pairs]

    @cached_property
    def choices(self) -> Tensor:
        """The id behind each choice of each slot, (S, W): <EOS>, the codes, then <PAD> where a type has fewer."""
        kinds, levels = self.slot_types.tolist(), self.slot_levels.tolist()
        rows = torch.full((len(kinds), 1 + max(t.codes for t in self.types)), self.pad)
        for row, k, level in zip(rows, kinds, levels, strict=True):
            count = self.types[k].codes
            first = self.codes(k).start + level * count
            row[END], row[1 : 1 + count] = self.eos, torch.arange(first, first + count)
        return rows

    @cached_property
    def possible(self) -> Tensor:
        """Choices that each slot allows while its type is open, (S, W) bool: no <EOS> before `least` concepts."""
        rows = self.choices != self.pad
        early = [position < t.least * t.levels for t in self.types for position in range(t.slots)]
        rows[:, END] = ~torch.tensor(early)
        return rows

    def names(self) -> list[str]:
        """The names of the new ids, in their order."""
        separators = [f"<SEP_{k + 1}>" for k in range(len(self.types))]
        codes = [
            f"<{t.name}:{code}>" if t.levels == 1 else f"<{t.name}.{level + 1}:{code}>"
            for t in self.types
            for level in range(t.levels)
            for code in range(t.codes)
        ]
        return [*SPECIAL, *separators, *codes]


def _checked(name: str, options: dict[str, int | None]) -> ConceptType:
    where = f"module.types.{name}"
    if unknown := set(options) - {"codes", "least", "most", "levels"}:
        raise UsageError(f"{where}.{min(unknown)} is not known; the options are codes, most, least and levels")
    codes, most, levels = options.get("codes"), options.get("most", 1), options.get("levels", 1)
    least = most if options.get("least") is None else options["least"]
    if codes is None or codes < 2:
        raise UsageError(f"{where}.codes={codes} must be at least 2")
    if most is None or least is None or most < 1 or not 0 <= least <= most:
        raise UsageError(f"{where} needs most of at least 1 and least from 0 to most, not most={most} least={least}")
    if levels is None or levels < 1:
        raise UsageError(f"{where}.levels={levels} must be at least 1; 1 is one code a concept")
    if levels > 1 and least < most:
        raise UsageError(f"{where}.levels={levels} needs a fixed number of concepts; type {where}.least=null")
    return ConceptType(name, codes, least, most, levels)
