"""The codes of a plan: a `CodeSpace` a type, as wide as the planner's choices.

Legend: B batch, n slots that are chosen together, S slots, D width, V codes of a level, W choices of a slot, d coordinates.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.backbones.code_space import Coded, CodeSpace, NamedCodes, Sampler
from models.functional.errors import UsageError, require_choice
from models.functional.gumbel import Choice
from models.plans.vocabulary import IMPOSSIBLE, ConceptVocabulary


class Quantiser(nn.Module):
    """A `CodeSpace` a type; `NamedCodes` for the `signal_types`, whose codes are values of a signal.

    Every type has exactly `most` concepts: there is no code for an end. The levels of a concept are chosen from one state, that
    before its coarse slot: each from what the levels before leave of that state's point.
    """

    def __init__(
        self, sampler: str, vocabulary: ConceptVocabulary, width: int, spread: float, signal_types: Collection[str] = ()
    ) -> None:
        super().__init__()
        for t in vocabulary.types:
            if t.least < t.most:
                raise UsageError(
                    f"module.sampler={sampler} has no code for an end; type module.types.{t.name}.least=null, "
                    "or module.sampler=gumbel_st"
                )
            if t.levels > 1 and t.name in signal_types:
                raise UsageError(
                    f"module.types.{t.name}.levels={t.levels} quantises points, and module.signal_codes=true gives that type "
                    f"codes of known meaning instead; type module.types.{t.name}.levels=1"
                )
        self.spaces = nn.ModuleList(
            NamedCodes(t.codes, width, spread)
            if t.name in signal_types
            else CodeSpace(t.codes, width, spread, sampler, f"module.types.{t.name}.codes", t.levels)
            for t in vocabulary.types
        )
        self.levels = max(t.levels for t in vocabulary.types)
        self.slot_types = vocabulary.slot_types.tolist()
        self.coarse_slots = [slot - level for slot, level in enumerate(vocabulary.slot_levels.tolist())]
        self.choices = vocabulary.choices.shape[1]

    @property
    def moving(self) -> bool:
        """Whether codes have to follow their points."""
        return any(isinstance(space, CodeSpace) and space.moving for space in self.spaces)

    def freeze_heads(self) -> None:
        """Heads of `NamedCodes` do not train: no posterior predicts these codes."""
        for space in self.spaces:
            if isinstance(space, NamedCodes):
                space.head.requires_grad_(False)

    def follow(self, points: Mapping[int, Tensor], decay: float, generator: Generator, *, begin: bool = False) -> int:
        """Move the codes of every type after the points of its coarse slots, of all ranks; the number of dead codes reset.

        begin: reset all codes to the centres of the points (k-means).
        """
        dead = 0
        for k, space in enumerate(self.spaces):
            own = [points[slot] for slot, kind in enumerate(self.slot_types) if kind == k and slot in points]
            if not own:
                continue
            if begin:
                space.begin(torch.cat(own), generator)
            else:
                dead += space.follow(torch.cat(own), decay, generator)
        return dead

    def embeddings(self) -> Tensor:
        """Embeddings (codes of all types, D), without their types'."""
        return torch.cat([space.table() for space in self.spaces])

    def forward(
        self, states: Tensor, slots: Sequence[int], share: float = 1.0, numbers: Mapping[int, Tensor] | None = None
    ) -> list[Coded]:
        """The choices at slots from the states (B, n, D) before them, all levels of a concept among them.

        Logits and weights are widened to W choices. numbers (B,): codes of slots with `NamedCodes` where they are known, -1
        where one is not.
        """
        state_before, known = dict(zip(slots, states.unbind(1), strict=True)), numbers or {}
        found, codes = list[Coded](), dict[int, Tensor]()
        for slot in slots:
            coarse = self.coarse_slots[slot]
            coarser = [codes[earlier] for earlier in range(coarse, slot)]
            coded = self.spaces[self.slot_types[slot]](state_before[coarse], share, known.get(slot), coarser)
            codes[slot] = coded.choice.hard.argmax(-1)
            choice = Choice(*map(self._widened, coded.choice))
            found.append(coded._replace(logits=self._widened(coded.logits, IMPOSSIBLE), choice=choice))
        return found

    def logits(self, states: Tensor, choices: Tensor) -> Tensor:
        """Logits (B, S, W) of all slots from the states (B, S, D) before them; a finer level given the choices (B, S)."""
        found, codes = [], (choices - 1).clamp(min=0)
        for slot, (kind, coarse) in enumerate(zip(self.slot_types, self.coarse_slots, strict=True)):
            logits = self.spaces[kind].logits_of(states[:, coarse], codes[:, coarse:slot].unbind(1))
            found.append(self._widened(logits, IMPOSSIBLE))
        return torch.stack(found, 1)

    def _widened(self, weights: Tensor, value: float = 0.0) -> Tensor:
        """(B, V) -> (B, W): `value` for the end, which comes before the codes, and for the choices past them."""
        return F.pad(weights, (1, self.choices - 1 - weights.shape[-1]), value=value)


def build_quantiser(
    sampler: str, vocabulary: ConceptVocabulary, width: int, spread: float, signal_types: Collection[str] = ()
) -> Quantiser | None:
    """None for `gumbel_st`, whose codes are rows of a table."""
    require_choice("module.sampler", sampler, get_args(Sampler))
    if sampler != "gumbel_st":
        return Quantiser(sampler, vocabulary, width, spread, signal_types)
    for t in vocabulary.types:
        if t.levels > 1:
            raise UsageError(
                f"module.types.{t.name}.levels={t.levels} quantises points, which module.sampler=gumbel_st has none of; "
                f"type module.sampler=ema_vq, or module.types.{t.name}.levels=1"
            )
    return None
