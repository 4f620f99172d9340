"""The codes of a plan: a `CodeSpace` a type, as wide as the planner's choices.

Legend: B batch, D width, V codes of a type, W choices of a slot, d coordinates.
"""

from collections.abc import Collection, Mapping
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

    Every type has exactly `most` concepts: there is no code for an end.
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
        self.spaces = nn.ModuleList(
            NamedCodes(t.codes, width, spread)
            if t.name in signal_types
            else CodeSpace(t.codes, width, spread, sampler, f"module.types.{t.name}.codes")
            for t in vocabulary.types
        )
        self.slot_types = vocabulary.slot_types.tolist()
        self.choices = vocabulary.choices.shape[1]

    @property
    def moving(self) -> bool:
        """Whether codes have to follow their points."""
        return any(isinstance(space, CodeSpace) and space.moving for space in self.spaces)

    def follow(self, points: Mapping[int, Tensor], decay: float, generator: Generator, *, begin: bool = False) -> int:
        """Move the codes of every type after the points of its slots, of all ranks; the number of dead codes that were reset.

        begin: reset all codes to the centres of the points (k-means).
        """
        dead = 0
        for k, space in enumerate(self.spaces):
            slots = [slot for slot, kind in enumerate(self.slot_types) if kind == k and slot in points]
            if not slots:
                continue
            own = torch.cat([points[slot] for slot in slots])
            if begin:
                space.begin(own, generator)
            else:
                dead += space.follow(own, decay, generator)
        return dead

    def embeddings(self) -> Tensor:
        """Embeddings (codes of all types, D), without their types'."""
        return torch.cat([space.table() for space in self.spaces])

    def forward(self, state: Tensor, slot: int, share: float = 1.0, number: Tensor | None = None) -> Coded:
        """The choice at a slot from the state (B, D) before it, its logits and weights widened to W choices.

        number (B,): the code of `NamedCodes` where it is known, -1 where it is not.
        """
        coded = self.spaces[self.slot_types[slot]](state, share, number)
        choice = Choice(*map(self._widened, coded.choice))
        return coded._replace(logits=self._widened(coded.logits, IMPOSSIBLE), choice=choice)

    def logits(self, state: Tensor, slot: int) -> Tensor:
        """Logits (B, W) of the choice at a slot from the state (B, D) before it."""
        return self._widened(self.spaces[self.slot_types[slot]].logits_of(state), IMPOSSIBLE)

    def _widened(self, weights: Tensor, value: float = 0.0) -> Tensor:
        """(B, V) -> (B, W): `value` for the end, which comes before the codes, and for the choices past them."""
        return F.pad(weights, (1, self.choices - 1 - weights.shape[-1]), value=value)


def build_quantiser(
    sampler: str, vocabulary: ConceptVocabulary, width: int, spread: float, signal_types: Collection[str] = ()
) -> Quantiser | None:
    """None for `gumbel_st`, whose codes are rows of a table."""
    require_choice("module.sampler", sampler, get_args(Sampler))
    return None if sampler == "gumbel_st" else Quantiser(sampler, vocabulary, width, spread, signal_types)
