"""Codes as points of a small space: a hidden state is mapped to a point, the point to its nearest code, that to an embedding.

Codes are a fixed lattice (`fsq`) or follow their points (`ema_vq`). Codes of known meaning need no space. A space may have
several levels: the codes of each quantise what those of the levels before leave of a point.
Legend: B batch, D width, V codes of a level, d coordinates.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.functional.errors import UsageError
from models.functional.fsq import fsq_bound, fsq_lattice, fsq_levels
from models.functional.gumbel import Choice, one_hot_argmax
from models.functional.precision import at_least_float32, without_autocast
from models.functional.vector_quantisation import (
    Codebook,
    assignment_sums,
    code_logits,
    ema_update,
    k_means,
    quantised,
    reset_dead,
    residuals,
)

Sampler = Literal["gumbel_st", "fsq", "ema_vq"]


COORDINATES = 8  # of a space whose codes move


class Coded(NamedTuple):
    """logits (B, W) and what was chosen; point (B, d) before quantising, None where there is no space.

    The point of a finer level is what the levels before it leave of the point.
    embeds, soft_embeds, hard_embeds (B, D): of the position between point and code, of the point, of the code.
    """

    logits: Tensor
    choice: Choice
    point: Tensor | None
    embeds: Tensor
    soft_embeds: Tensor
    hard_embeds: Tensor


class CodeSpace(nn.Module):
    """Points and `codes` codes a level, such as those of one type.

    The buffer `codes` (levels * V, d) has their coordinates, the coarse level first. All levels share the two linear maps, so
    that the embeddings of a point's codes add up to the embedding of the point that they stand for.
    spread: of fresh embeddings. option: what sets the number of codes, for a number that makes no lattice.
    """

    def __init__(self, codes: int, width: int, spread: float, sampler: str, option: str, levels: int = 1) -> None:
        super().__init__()
        self.moving, self.levels = sampler == "ema_vq", levels
        if self.moving:
            table = torch.zeros(levels * codes, COORDINATES)
        else:
            steps = fsq_levels(codes, option)
            self.register_buffer("steps", torch.tensor(steps, dtype=torch.float32), persistent=False)
            # the box of points that are nearest to one code is the whole box, divided by the steps of each coordinate
            table = torch.cat([fsq_lattice(steps) / self.steps**level for level in range(levels)])
        coordinates = table.shape[1]
        self.to_point = nn.Linear(width, coordinates, bias=False)
        self.to_embedding = nn.Linear(coordinates, width, bias=False)
        nn.init.normal_(self.to_point.weight, std=width**-0.5)
        nn.init.normal_(self.to_embedding.weight, std=spread / math.sqrt(coordinates))
        self.register_buffer("codes", table)
        self.register_buffer("counts", torch.zeros(len(table)))
        self.register_buffer("sums", torch.zeros_like(table))

    def point(self, state: Tensor) -> Tensor:
        point = self.to_point(state)
        return point if self.moving else fsq_bound(point, self.steps)

    def residual(self, point: Tensor, coarser: Sequence[Tensor]) -> Tensor:
        """What the codes that were chosen at the coarser levels, (B,) each, leave of points (B, d). Codes have no gradient."""
        for book, number in zip(self.books, coarser, strict=False):
            point = point - book.codes[number]
        return point

    def logits(self, point: Tensor, level: int = 0) -> Tensor:
        """How near each code of a level is to points (..., d), (..., V)."""
        return at_least_float32(code_logits(point, self.books[level].codes))

    def logits_of(self, state: Tensor, coarser: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B, V) from states (B, D), of the level after the coarser ones, given their codes (B,)."""
        return self.logits(self.residual(self.point(state), coarser), len(coarser))

    def table(self) -> Tensor:
        """The codes' embeddings (levels * V, D)."""
        return self.to_embedding(self.codes)

    def forward(self, state: Tensor, share: float, number: None = None, coarser: Sequence[Tensor] = ()) -> Coded:
        """share: of the distance from the point to its code, at which the embedding is taken.

        coarser: the codes (B,) that were chosen at the levels before this one.
        """
        level = len(coarser)
        point = self.residual(self.point(state), coarser)
        logits = self.logits(point, level)
        hard = one_hot_argmax(logits)
        code = hard.to(point.dtype) @ self.books[level].codes
        embeds = (self.to_embedding(at) for at in (quantised(point, code, share), point, code))
        return Coded(logits, Choice(logits.softmax(-1), hard), point, *embeds)

    @property
    def books(self) -> list[Codebook]:
        """The codebook of each level."""
        parts = (part.chunk(self.levels) for part in (self.codes, self.counts, self.sums))
        return [Codebook(*book) for book in zip(*parts, strict=True)]

    @torch.no_grad()
    def begin(self, points: Tensor, generator: Generator) -> None:
        """The codes of each level start at the centres of what the levels before leave of points (N, d)."""
        points, books = points.to(self.codes.dtype), list[Codebook]()
        with without_autocast(points):
            for _ in range(self.levels):
                left = residuals(points, [book.codes for book in books])[-1]
                centres = k_means(left, len(self.codes) // self.levels, generator)
                counts, _ = assignment_sums(left, centres)
                books.append(Codebook(centres, counts, centres * counts.unsqueeze(-1)))
        self._keep(books)

    @torch.no_grad()
    def follow(self, points: Tensor, decay: float, generator: Generator) -> int:
        """Move the codes of each level to what the levels before left of points (N, d); how many dead ones were set anew."""
        points, books, dead = points.to(self.codes.dtype), list[Codebook](), 0
        with without_autocast(points):
            of_levels = residuals(points, [book.codes for book in self.books[:-1]])
            for book, left in zip(self.books, of_levels, strict=True):
                moved = ema_update(book, *assignment_sums(left, book.codes), decay)
                moved, reset = reset_dead(moved, left, len(left) / len(book.codes) / 50, generator)
                books.append(moved)
                dead += reset
        self._keep(books)
        return dead

    def _keep(self, books: list[Codebook]) -> None:
        """New tensors, not new values in place: the gradient still needs the old ones."""
        self.codes, self.counts, self.sums = (torch.cat(part) for part in zip(*books, strict=True))


class NamedCodes(nn.Module):
    """Codes whose meaning is known: a head predicts them and a table embeds them, as with tokens.

    The embeddings have a gradient to the table alone; the head is supervised elsewhere (`signals.SignalCodes`).
    """

    def __init__(self, codes: int, width: int, spread: float) -> None:
        super().__init__()
        self.head = nn.Linear(width, codes, bias=False)
        self.rows = nn.Embedding(codes, width)
        nn.init.normal_(self.head.weight, std=width**-0.5)
        nn.init.normal_(self.rows.weight, std=spread)

    def logits_of(self, state: Tensor, coarser: Sequence[Tensor] = ()) -> Tensor:
        return at_least_float32(self.head(state))

    def table(self) -> Tensor:
        return self.rows.weight

    def forward(
        self, state: Tensor, share: float, number: Tensor | None = None, coarser: Sequence[Tensor] = ()
    ) -> Coded:
        """number (B,): the code that replaces the most probable one, -1 where it is not known."""
        logits = self.logits_of(state)
        hard = one_hot_argmax(logits)
        if number is not None:
            known = F.one_hot(number.clamp(min=0), hard.shape[-1]).to(hard.dtype)
            hard = torch.where((number >= 0).unsqueeze(-1), known, hard)
        embeds = hard.to(self.rows.weight.dtype) @ self.rows.weight
        return Coded(logits, Choice(logits.softmax(-1), hard), None, embeds, embeds, embeds)


def require_whole_codes(model: nn.Module, precision: str) -> None:
    """Errors: UsageError where a `CodeSpace` would be kept in 16 bits, in which its slow running means would not move."""
    if precision in ("bf16-true", "16-true") and any(isinstance(part, CodeSpace) for part in model.modules()):
        raise UsageError(
            f"trainer.precision={precision}: codes of fsq and ema_vq lie in float32; type trainer.precision=bf16-mixed, "
            "or module.sampler=gumbel_st"
        )
