"""Codes as places of a small space: a state becomes a point, the point its nearest code, the code an embedding.

One space for each type, of a fixed lattice (`fsq`) or of codes that follow their points (`ema_vq`).
Legend: B batch, D width, V codes of a type, W choices of a slot, d coordinates.
"""

import math
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import one_hot

from models.concept.vocabulary import IMPOSSIBLE, ConceptVocabulary
from models.functional.errors import UsageError, require_choice
from models.functional.fsq import fsq_bound, fsq_lattice, fsq_levels
from models.functional.gumbel import Choice, one_hot_argmax
from models.functional.precision import at_least_float32, in_full
from models.functional.vector_quantisation import (
    Codebook,
    assignment_sums,
    class_sums,
    code_logits,
    ema_update,
    k_means,
    quantised,
    reset_dead,
)

Sampler = Literal["gumbel_st", "fsq", "ema_vq"]
COORDINATES = 8  # of a space whose codes move


class Coded(NamedTuple):
    """logits (B, W) and what was chosen; point (B, d) before quantising.

    embeds, soft_embeds, hard_embeds (B, D): of the place between point and code, of the point, of the code.
    """

    logits: Tensor
    choice: Choice
    point: Tensor
    embeds: Tensor
    soft_embeds: Tensor
    hard_embeds: Tensor


class CodeSpace(nn.Module):
    """Points and `codes` codes, such as those of one type; the buffer `codes` (V, d) says where they lie.

    spread: of fresh embeddings. option: what sets the number of codes, for a number that makes no lattice. named: each code
    has an embedding of its own, which learns as words' do, in the place of its place in the space.
    """

    def __init__(
        self, codes: int, width: int, spread: float, sampler: str, option: str, *, named: bool = False
    ) -> None:
        super().__init__()
        self.moving = sampler == "ema_vq"
        if self.moving:
            places = torch.zeros(codes, COORDINATES)
        else:
            levels = fsq_levels(codes, option)
            places = fsq_lattice(levels)
            self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)
        coordinates = places.shape[1]
        self.to_point = nn.Linear(width, coordinates, bias=False)
        self.named = named
        nn.init.normal_(self.to_point.weight, std=width**-0.5)
        if named:
            self.rows = nn.Embedding(codes, width)
            nn.init.normal_(self.rows.weight, std=spread)
        else:
            self.to_embedding = nn.Linear(coordinates, width, bias=False)
            nn.init.normal_(self.to_embedding.weight, std=spread / math.sqrt(coordinates))
        self.register_buffer("codes", places)
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros_like(places))

    def point(self, state: Tensor) -> Tensor:
        point = self.to_point(state)
        return point if self.moving else fsq_bound(point, self.levels)

    def logits(self, point: Tensor) -> Tensor:
        """How near each code is to points (..., d), (..., V)."""
        return at_least_float32(code_logits(point, self.codes))

    def forward(self, state: Tensor, share: float, number: Tensor | None = None) -> Coded:
        """share: how far from the point to its code the embedding stands. number (B,): the code, -1 for the nearest."""
        point = self.point(state)
        logits = self.logits(point)
        hard = one_hot_argmax(logits)
        if number is not None:
            known = one_hot(number.clamp(min=0), len(self.codes)).to(hard.dtype)
            hard = torch.where((number >= 0).unsqueeze(-1), known, hard)
        choice = Choice(logits.softmax(-1), hard)
        if self.named:
            embeds = hard.to(self.rows.weight.dtype) @ self.rows.weight
            return Coded(logits, choice, point, embeds, embeds, embeds)
        code = hard.to(point.dtype) @ self.codes
        embeds = (self.to_embedding(place) for place in (quantised(point, code, share), point, code))
        return Coded(logits, choice, point, *embeds)

    def table(self) -> Tensor:
        """The codes' embeddings (V, D)."""
        return self.rows.weight if self.named else self.to_embedding(self.codes)

    @property
    def book(self) -> Codebook:
        return Codebook(self.codes, self.counts, self.sums)

    @torch.no_grad()
    def begin(self, points: Tensor, generator: Generator, numbers: Tensor | None = None) -> None:
        """Codes start at the centres of points (N, d), or of those with their number (N,), -1 where that is not known."""
        points = points.to(self.codes.dtype)
        with in_full(points):
            centres = k_means(points, len(self.codes), generator)
            if numbers is None:
                counts, _ = assignment_sums(points, centres)
            else:
                counts, sums = class_sums(points, numbers, len(self.codes))
                centres = torch.where(counts.unsqueeze(-1) > 0, sums / counts.clamp(min=1).unsqueeze(-1), centres)
        self._keep(Codebook(centres, counts, centres * counts.unsqueeze(-1)))

    @torch.no_grad()
    def follow(self, points: Tensor, decay: float, generator: Generator, numbers: Tensor | None = None) -> int:
        """Move codes to their points (N, d), or to those with their number (N,); how many dead ones were set anew."""
        points = points.to(self.codes.dtype)
        with in_full(points):
            if numbers is not None:
                self._keep(ema_update(self.book, *class_sums(points, numbers, len(self.codes)), decay))
                return 0
            book = ema_update(self.book, *assignment_sums(points, self.codes), decay)
        book, dead = reset_dead(book, points, len(points) / len(self.codes) / 50, generator)
        self._keep(book)
        return dead

    def _keep(self, book: Codebook) -> None:
        """New tensors, not new values: those of before are still wanted for the gradient."""
        self.codes, self.counts, self.sums = book


def require_whole_codes(model: nn.Module, precision: str) -> None:
    """Errors: UsageError where a `CodeSpace` would be kept in 16 bits: a mean that creeps would stand still."""
    if precision in ("bf16-true", "16-true") and any(isinstance(part, CodeSpace) for part in model.modules()):
        raise UsageError(
            f"trainer.precision={precision}: codes of fsq and ema_vq lie in float32; type trainer.precision=bf16-mixed, "
            "or module.sampler=gumbel_st"
        )


class Quantiser(nn.Module):
    """A `CodeSpace` a type. Types have as many concepts as `most` says: no code stands for an end.

    named: types whose codes have embeddings of their own.
    """

    def __init__(
        self, sampler: str, vocabulary: ConceptVocabulary, width: int, spread: float, named: Collection[str] = ()
    ) -> None:
        super().__init__()
        for t in vocabulary.types:
            if t.least < t.most:
                raise UsageError(
                    f"module.sampler={sampler} has no code for an end; type module.types.{t.name}.least=null, "
                    "or module.sampler=gumbel_st"
                )
        self.spaces = nn.ModuleList(
            CodeSpace(t.codes, width, spread, sampler, f"module.types.{t.name}.codes", named=t.name in named)
            for t in vocabulary.types
        )
        self.slot_types = vocabulary.slot_types.tolist()
        self.choices = vocabulary.choices.shape[1]

    @property
    def moving(self) -> bool:
        """Whether codes have to follow their points."""
        return self.spaces[0].moving

    def follow(
        self,
        points: Mapping[int, Tensor],
        decay: float,
        generator: Generator,
        *,
        begin: bool = False,
        numbers: Mapping[int, Tensor] | None = None,
    ) -> int:
        """Move the codes of every type after the points of its slots, of all ranks; how many dead ones were set anew.

        begin: set them all anew, at the centres of the points. numbers: of slots whose points' codes are known.
        """
        dead = 0
        for k, space in enumerate(self.spaces):
            slots = [slot for slot, kind in enumerate(self.slot_types) if kind == k]
            own = torch.cat([points[slot] for slot in slots])
            known = torch.cat([numbers[slot] for slot in slots]) if numbers and slots[0] in numbers else None
            if begin:
                space.begin(own, generator, known)
            else:
                dead += space.follow(own, decay, generator, known)
        return dead

    def embeddings(self) -> Tensor:
        """Embeddings (codes of all types, D), without their types'."""
        return torch.cat([space.table() for space in self.spaces])

    def forward(self, state: Tensor, slot: int, share: float = 1.0, number: Tensor | None = None) -> Coded:
        """The choice at a slot from the state (B, D) before it, its logits and weights widened to W choices.

        number (B,): of the code where it is known, else -1.
        """
        coded = self.spaces[self.slot_types[slot]](state, share, number)
        choice = Choice(*map(self._widened, coded.choice))
        return coded._replace(logits=self._widened(coded.logits, IMPOSSIBLE), choice=choice)

    def logits(self, state: Tensor, slot: int) -> Tensor:
        """Logits (B, W) of the choice at a slot from the state (B, D) before it."""
        space = self.spaces[self.slot_types[slot]]
        return self._widened(space.logits(space.point(state)), IMPOSSIBLE)

    def _widened(self, weights: Tensor, value: float = 0.0) -> Tensor:
        """(B, V) -> (B, W): no end before the codes, nothing behind them."""
        return torch.nn.functional.pad(weights, (1, self.choices - 1 - weights.shape[-1]), value=value)


def build_quantiser(
    sampler: str, vocabulary: ConceptVocabulary, width: int, spread: float, named: Collection[str] = ()
) -> Quantiser | None:
    """None for `gumbel_st`, whose codes are rows of a table."""
    require_choice("module.sampler", sampler, get_args(Sampler))
    return None if sampler == "gumbel_st" else Quantiser(sampler, vocabulary, width, spread, named)
