"""Codes as points of a small space: a hidden state is mapped to a point, the point to its nearest code, that to an embedding.

Codes are a fixed lattice (`fsq`) or follow their points (`ema_vq`). Codes of known meaning need no space.
Legend: B batch, D width, V codes, d coordinates.
"""

import math
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
)

Sampler = Literal["gumbel_st", "fsq", "ema_vq"]


COORDINATES = 8  # of a space whose codes move


class Coded(NamedTuple):
    """logits (B, W) and what was chosen; point (B, d) before quantising, None where there is no space.

    embeds, soft_embeds, hard_embeds (B, D): of the position between point and code, of the point, of the code.
    """

    logits: Tensor
    choice: Choice
    point: Tensor | None
    embeds: Tensor
    soft_embeds: Tensor
    hard_embeds: Tensor


class CodeSpace(nn.Module):
    """Points and `codes` codes, such as those of one type; the buffer `codes` (V, d) has their coordinates.

    spread: of fresh embeddings. option: what sets the number of codes, for a number that makes no lattice.
    """

    def __init__(self, codes: int, width: int, spread: float, sampler: str, option: str) -> None:
        super().__init__()
        self.moving = sampler == "ema_vq"
        if self.moving:
            table = torch.zeros(codes, COORDINATES)
        else:
            levels = fsq_levels(codes, option)
            table = fsq_lattice(levels)
            self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)
        coordinates = table.shape[1]
        self.to_point = nn.Linear(width, coordinates, bias=False)
        self.to_embedding = nn.Linear(coordinates, width, bias=False)
        nn.init.normal_(self.to_point.weight, std=width**-0.5)
        nn.init.normal_(self.to_embedding.weight, std=spread / math.sqrt(coordinates))
        self.register_buffer("codes", table)
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros_like(table))

    def point(self, state: Tensor) -> Tensor:
        point = self.to_point(state)
        return point if self.moving else fsq_bound(point, self.levels)

    def logits(self, point: Tensor) -> Tensor:
        """How near each code is to points (..., d), (..., V)."""
        return at_least_float32(code_logits(point, self.codes))

    def logits_of(self, state: Tensor) -> Tensor:
        return self.logits(self.point(state))

    def table(self) -> Tensor:
        """The codes' embeddings (V, D)."""
        return self.to_embedding(self.codes)

    def forward(self, state: Tensor, share: float, number: None = None) -> Coded:
        """share: of the distance from the point to its code, at which the embedding is taken."""
        point = self.point(state)
        logits = self.logits(point)
        hard = one_hot_argmax(logits)
        code = hard.to(point.dtype) @ self.codes
        embeds = (self.to_embedding(at) for at in (quantised(point, code, share), point, code))
        return Coded(logits, Choice(logits.softmax(-1), hard), point, *embeds)

    @property
    def book(self) -> Codebook:
        return Codebook(self.codes, self.counts, self.sums)

    @torch.no_grad()
    def begin(self, points: Tensor, generator: Generator) -> None:
        """Codes start at the centres of points (N, d)."""
        points = points.to(self.codes.dtype)
        with without_autocast(points):
            centres = k_means(points, len(self.codes), generator)
            counts, _ = assignment_sums(points, centres)
        self._keep(Codebook(centres, counts, centres * counts.unsqueeze(-1)))

    @torch.no_grad()
    def follow(self, points: Tensor, decay: float, generator: Generator) -> int:
        """Move codes to their points (N, d); how many dead ones were set anew."""
        points = points.to(self.codes.dtype)
        with without_autocast(points):
            book = ema_update(self.book, *assignment_sums(points, self.codes), decay)
        book, dead = reset_dead(book, points, len(points) / len(self.codes) / 50, generator)
        self._keep(book)
        return dead

    def _keep(self, book: Codebook) -> None:
        """New tensors, not new values in place: the gradient still needs the old ones."""
        self.codes, self.counts, self.sums = book


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

    def logits_of(self, state: Tensor) -> Tensor:
        return at_least_float32(self.head(state))

    def table(self) -> Tensor:
        return self.rows.weight

    def forward(self, state: Tensor, share: float, number: Tensor | None = None) -> Coded:
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
