"""Where concepts and text stand: columns, positions and types of what planner and executor read.

A plan is one block of columns, for each type <SEP_i>, its slots, and one more for an <EOS> after the last slot. Positions start
again with each type: separator 0, concepts from 1. Text starts at a constant position past the longest type, wherever its
columns are, so that neither the lengths of a plan nor padding move it.
Legend: B batch, T text columns, C columns of a plan's block, S slots.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.functional.attention import positions_from_mask
from models.functional.next_token import until_end
from models.plans.vocabulary import END, ConceptVocabulary

# sequential: each slot given all before it; types: given those of its own type; slots: all at once, given the text alone
Planning = Literal["sequential", "types", "slots"]


class Columns(NamedTuple):
    """What is read: mask (B, L) bool, position_ids (B, L), type_ids (B, L) with 0 for text and what belongs to none."""

    mask: Tensor
    position_ids: Tensor
    type_ids: Tensor

    def take(self, places: Tensor) -> "Columns":
        """The columns at these places (n,)."""
        return Columns(*(field[:, places] for field in self))


def joined(*parts: Columns) -> Columns:
    """One after the other."""
    return Columns(*(torch.cat(fields, -1) for fields in zip(*parts, strict=True)))


class Round(NamedTuple):
    """What is decided together: columns of the block that are read first, and the slots chosen from the last of them."""

    columns: Tensor
    slots: list[int]


def types_apart(columns: Columns, asking: int) -> Tensor:
    """Who sees whom where types do not see each other, (B, 1, asking, L) bool for the last `asking` of L columns.

    A column sees the real ones before it that belong to no type or to its own: one prefix serves all types.
    """
    length = columns.mask.shape[1]
    place = torch.arange(length, device=columns.mask.device)
    earlier = place <= place[length - asking :].unsqueeze(-1)
    kind = columns.type_ids.unsqueeze(1)
    own = (kind == 0) | (kind == kind[..., length - asking :].transpose(1, 2))
    return (earlier & own & columns.mask.unsqueeze(1)).unsqueeze(1)


class PlanLayout:
    """Columns of a vocabulary's plans. slot_columns (S,): where in the block each slot stands."""

    def __init__(self, vocabulary: ConceptVocabulary) -> None:
        self.vocabulary = vocabulary
        positions, types, skeleton, slots = [], [], [], []
        for k, t in enumerate(vocabulary.types):
            slots += range(len(skeleton) + 1, len(skeleton) + 1 + t.most)
            positions += range(t.most + 2)
            types += [k + 1] * (t.most + 2)
            skeleton += [vocabulary.separator(k)] + [vocabulary.pad] * (t.most + 1)
        self.position_ids, self.type_ids = torch.tensor(positions), torch.tensor(types)
        self.skeleton, self.slot_columns = torch.tensor(skeleton), torch.tensor(slots)
        self.text_start = max(t.most for t in vocabulary.types) + 2

    @property
    def columns(self) -> int:
        return len(self.skeleton)

    def rounds(self, planning: Planning) -> list[Round]:
        """In which order slots are chosen. Before each stands the column whose state it is chosen from."""
        before = self.slot_columns - 1
        if planning == "slots":
            return [Round(before, list(range(len(before))))]
        if planning == "types":
            place = self.position_ids[before]
            rounds = [(place == p).nonzero().flatten() for p in place.unique()]
            return [Round(before[slots], slots.tolist()) for slots in rounds]
        first = [0, *(before[:-1] + 1).tolist()]
        return [Round(torch.arange(f, b + 1), [s]) for s, (f, b) in enumerate(zip(first, before.tolist(), strict=True))]

    def unwritten(self, rows: int) -> Tensor:
        """Ids (rows, C) of a block whose concepts cannot be read: <BLANK> at every slot."""
        ids = self.skeleton.clone()
        ids[self.slot_columns] = self.vocabulary.blank
        return ids.expand(rows, -1)

    def open_slots(self, choices: Tensor) -> Tensor:
        """(B, S) bool: slots at which something was chosen, those up to and with the first end of their type."""
        parts = [until_end(own, END) for own in self._by_type(choices)]
        return torch.cat(parts, -1)

    def block(self, choices: Tensor) -> Tensor:
        """Ids (B, C) of the plans with these choices (B, S): separators, codes, one <EOS> a type, <PAD> behind it."""
        v = self.vocabulary
        table = v.choices.to(choices.device)
        parts = []
        for k, own in enumerate(self._by_type(choices)):
            alive = until_end(own, END)
            ids = torch.where(alive, table[k][own], v.pad)
            full = alive[:, -1:] & (own[:, -1:] != END)
            last = torch.where(full, v.eos, v.pad)
            parts += [torch.full_like(last, v.separator(k)), ids, last]
        return torch.cat(parts, -1)

    def of_block(self, ids: Tensor) -> Columns:
        """Columns of a block (B, C); <PAD> is not looked at."""
        place, kind = (part.to(ids.device).expand_as(ids) for part in (self.position_ids, self.type_ids))
        return Columns(ids != self.vocabulary.pad, place, kind)

    def of_text(self, mask: Tensor) -> Columns:
        """Columns of text (B, T), padded on any side: the first real token stands just past <TEXT>'s position."""
        return Columns(mask, positions_from_mask(mask) + self.text_start + 1, torch.zeros_like(mask, dtype=torch.long))

    def of_special(self, like: Tensor, position: int = 0) -> Columns:
        """One column of a token that belongs to no type, for each row of `like`."""
        zero = torch.zeros(len(like), 1, dtype=torch.long, device=like.device)
        return Columns(torch.ones_like(zero, dtype=torch.bool), zero + position, zero)

    def _by_type(self, choices: Tensor) -> tuple[Tensor, ...]:
        return choices.split([t.most for t in self.vocabulary.types], -1)
