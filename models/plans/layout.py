"""The layout of plans and text: columns, position ids and type ids of what planner and executor read.

A plan is one block of columns. Each type has <SEP_i>, its slots, and one column for an <EOS> after the last slot. Each level of
a concept is a slot: the prior reads the coarse code before it chooses the finer one, and the executor reads the same. Positions
start again with each type: separator 0, concepts from 1. Text starts at a constant position past the longest type, so that its
positions depend neither on the length of the plan nor on padding.
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

    def take(self, index: Tensor) -> "Columns":
        """The columns of an index (n,)."""
        return Columns(*(field[:, index] for field in self))


def joined(*parts: Columns) -> Columns:
    """Columns one after the other."""
    return Columns(*(torch.cat(fields, -1) for fields in zip(*parts, strict=True)))


class Round(NamedTuple):
    """Slots that are chosen together, from the last of the block's columns that are read before."""

    columns: Tensor
    slots: list[int]


def types_apart(columns: Columns, asking: int) -> Tensor:
    """The attention mask where types do not attend to each other, (B, 1, asking, L) bool, for the last `asking` of L columns.

    A column attends to earlier real columns that belong to no type or to its own.
    """
    length = columns.mask.shape[1]
    column = torch.arange(length, device=columns.mask.device)
    earlier = column <= column[length - asking :].unsqueeze(-1)
    kind = columns.type_ids.unsqueeze(1)
    own = (kind == 0) | (kind == kind[..., length - asking :].transpose(1, 2))
    return (earlier & own & columns.mask.unsqueeze(1)).unsqueeze(1)


class PlanLayout:
    """Columns of a vocabulary's plans. slot_columns (S,): the column of each slot in the block."""

    def __init__(self, vocabulary: ConceptVocabulary) -> None:
        self.vocabulary = vocabulary
        positions, types, skeleton, slots = (list[int]() for _ in range(4))
        for k, t in enumerate(vocabulary.types):
            slots += range(len(skeleton) + 1, len(skeleton) + 1 + t.slots)
            positions += range(t.slots + 2)
            types += [k + 1] * (t.slots + 2)
            skeleton += [vocabulary.separator(k)] + [vocabulary.pad] * (t.slots + 1)
        self.position_ids, self.type_ids = torch.tensor(positions), torch.tensor(types)
        self.skeleton, self.slot_columns = torch.tensor(skeleton), torch.tensor(slots)
        self.text_start = max(t.slots for t in vocabulary.types) + 2

    @property
    def columns(self) -> int:
        return len(self.skeleton)

    def rounds(self, planning: Planning) -> list[Round]:
        """The order in which slots are chosen, each from the hidden state of the column before it."""
        before = self.slot_columns - 1
        if planning == "slots":
            return [Round(before, list(range(len(before))))]
        if planning == "types":
            position = self.position_ids[before]
            rounds = [(position == p).nonzero().flatten() for p in position.unique()]
            return [Round(before[slots], slots.tolist()) for slots in rounds]
        first = [0, *(before[:-1] + 1).tolist()]
        return [Round(torch.arange(f, b + 1), [s]) for s, (f, b) in enumerate(zip(first, before.tolist(), strict=True))]

    def columns_before_slots(self, planning: Planning) -> Tensor:
        """The columns (n,) of a block that some slot's choice depends on, in their order."""
        column, last = torch.arange(self.columns), self.slot_columns[-1] - 1
        if planning == "sequential":
            return column[: last + 1]
        kinds = self.type_ids[self.slot_columns]
        last_of = torch.stack([self.slot_columns[kinds == kind].max() - 1 for kind in kinds.unique()])
        return column[column <= last_of[self.type_ids - 1]]

    def unwritten(self, rows: int) -> Tensor:
        """Ids (rows, C) of a block with <BLANK> at every slot."""
        ids = self.skeleton.clone()
        ids[self.slot_columns] = self.vocabulary.blank
        return ids.expand(rows, -1)

    def open_slots(self, choices: Tensor) -> Tensor:
        """Slots up to and including the first end of their type, (B, S) bool."""
        parts = [until_end(own, END) for own in self._by_type(choices)]
        return torch.cat(parts, -1)

    def block(self, choices: Tensor) -> Tensor:
        """Ids (B, C) of the plans with these choices (B, S): separators, codes, one <EOS> a type, <PAD> behind it."""
        v = self.vocabulary
        chosen = v.choices.to(choices.device)[torch.arange(choices.shape[1], device=choices.device), choices]
        parts = []
        for k, (own, ids) in enumerate(zip(self._by_type(choices), self._by_type(chosen), strict=True)):
            alive = until_end(own, END)
            ids = torch.where(alive, ids, v.pad)
            full = alive[:, -1:] & (own[:, -1:] != END)
            last = torch.where(full, v.eos, v.pad)
            parts += [torch.full_like(last, v.separator(k)), ids, last]
        return torch.cat(parts, -1)

    def of_block(self, ids: Tensor) -> Columns:
        """Columns of a block (B, C); <PAD> is masked."""
        position, kind = (part.to(ids.device).expand_as(ids) for part in (self.position_ids, self.type_ids))
        return Columns(ids != self.vocabulary.pad, position, kind)

    def of_text(self, mask: Tensor) -> Columns:
        """Columns of text (B, T), padded on any side: the first real token comes just past <TEXT>'s position."""
        return Columns(mask, positions_from_mask(mask) + self.text_start + 1, torch.zeros_like(mask, dtype=torch.long))

    def of_special(self, like: Tensor, position: int = 0) -> Columns:
        """One column of a token that belongs to no type, for each row of `like`."""
        zero = torch.zeros(len(like), 1, dtype=torch.long, device=like.device)
        return Columns(torch.ones_like(zero, dtype=torch.bool), zero + position, zero)

    def _by_type(self, choices: Tensor) -> tuple[Tensor, ...]:
        return choices.split([t.slots for t in self.vocabulary.types], -1)
