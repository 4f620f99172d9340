"""Span corruption (Raffel et al., T5, 2020; Tay et al., UL2, 2022): which tokens to cut out, and the input and
target that result.

All spans have the same sentinel id; their order tells them apart.
Legend: B batch, L length, N tokens cut out of a row, S spans.
"""

import torch
from torch import Generator, Tensor

from models.functional.uniform import uniform


def span_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """(N, S): round(length density) tokens in about N / mean_span spans, with at least one token kept before each span."""
    cut = min(max(round(length * density), 1), length - 1)
    return cut, min(max(round(cut / mean_span), 1), cut, length - cut)


def random_spans(rows: int, length: int, cut: int, spans: int, generator: Generator, device: torch.device) -> Tensor:
    """Bool (B, L): `cut` tokens of each row in `spans` spans apart from each other, every placement equally likely.

    A row begins with a kept token, and a span is always followed by a kept token or the end.
    """
    kept_lengths = _random_parts(rows, length - cut, spans, generator, device)
    cut_lengths = _random_parts(rows, cut, spans, generator, device)
    lengths = torch.stack([kept_lengths, cut_lengths], -1).flatten(1)  # kept, cut, kept, cut ...
    ends = lengths.cumsum(-1)
    position = torch.arange(length, device=device).expand(rows, -1).contiguous()
    return torch.searchsorted(ends, position, right=True) % 2 == 1


def _random_parts(rows: int, total: int, parts: int, generator: Generator, device: torch.device) -> Tensor:
    """(B, parts) lengths of at least 1 that sum to `total`."""
    draws = uniform(rows, total - 1, generator=generator)
    borders = draws.argsort(-1)[:, : parts - 1].sort(-1).values + 1
    edges = [borders.new_zeros(rows, 1), borders, borders.new_full((rows, 1), total)]
    return torch.cat(edges, -1).diff(dim=-1)


def input_and_target(x0: Tensor, cut: Tensor, sentinel: int) -> tuple[Tensor, Tensor]:
    """Input: the text with a sentinel in place of each span, (B, L - N + S). Target: each span after its sentinel, (B, N + S).

    x0 (B, L) ids; cut (B, L) bool with the same N and S in every row.
    """
    begins = cut & ~torch.nn.functional.pad(cut[:, :-1], (1, 0))
    rows = len(x0)
    corrupted = torch.where(cut, sentinel, x0)[~cut | begins].view(rows, -1)
    # every cut token, and before the first of each span its sentinel
    pairs = torch.stack([torch.full_like(x0, sentinel), x0], -1)
    target = pairs[torch.stack([begins, cut], -1)].view(rows, -1)
    return corrupted, target
