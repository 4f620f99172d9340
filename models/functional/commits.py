r"""Commits: positions of a text that become concepts. Packing, attention masks and rules of when to commit.

A position either commits (g_t = 1) or is a NULL (g_t = 0); tau(t) is the last commit at or before t. Deep layers at t attend
to the concepts up to tau(t) and to the tail, the NULLs tau(t)+1 .. t. One forward pass has exactly T deep slots.
Legend: B batch, T positions, M packed concepts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.functional.attention import document_attention_mask


class Packing(NamedTuple):
    """indices (B, M): positions of the commits in order, then of padding; real (B, M): False on padding.

    segment (B, T): number of commits at or before a position; slot (B, T): packed index of tau(t), 0 before the first commit.
    """

    indices: Tensor
    real: Tensor
    segment: Tensor
    slot: Tensor


def pack_commits(commit: Tensor) -> Packing:
    """commit (B, T) bool, False on padding -> `Packing` with M = the most commits of any row, at least 1.

    Padding stands behind a row's last commit, so that layers that are causal in the packed order need no padding mask.
    """
    g = commit.long()
    segment = g.cumsum(1)
    count = segment[:, -1]
    position = torch.arange(commit.shape[1], device=commit.device)
    most = max(1, int(count.max()))
    index = (position + len(position) * (1 - g)).argsort(1)[:, :most]
    return Packing(index, position[:most] < count.unsqueeze(1), segment, (segment - 1).clamp(min=0))


def take(states: Tensor, index: Tensor) -> Tensor:
    """states (B, T, ...) at index (B, M) -> (B, M, ...)."""
    flat = index.view(*index.shape, *[1] * (states.ndim - 2))
    return states.gather(1, flat.expand(*index.shape, *states.shape[2:]))


def latest(concepts: Tensor, count: Tensor, documents: Tensor | None = None, owners: Tensor | None = None) -> Tensor:
    """Concept number `count` of concepts (B, M, D), count (B, T) from 1 -> (B, T, D); 0 at count 0.

    documents (B, T) and owners (B, M), the documents of concepts: also 0 where that concept is of another document.
    """
    slot, exists = (count - 1).clamp(min=0), count > 0
    if documents is not None:
        assert owners is not None
        exists = exists & (owners.gather(1, slot) == documents)
    return take(concepts, slot) * exists.unsqueeze(-1)


def tail_means(states: Tensor, commit: Tensor, valid: Tensor, documents: Tensor | None = None) -> Tensor:
    """Mean state of the tail before each position, and of the last tail, (B, T + 1, D); 0 of an empty tail.

    states (B, T, D); commit, valid (B, T) bool; documents (B, T): a tail never crosses documents. Computed as differences of
    cumulative sums, in float64.
    """
    position = torch.arange(commit.shape[1] + 1, device=commit.device)
    starts = F.pad(commit, (1, 0), value=True)
    if documents is not None:
        starts = starts | F.pad(document_begins(documents), (0, 1))
    start = torch.where(starts, position, 0).cummax(1).values
    summed = F.pad((states * valid.unsqueeze(-1)).double().cumsum(1), (0, 0, 1, 0))
    count = F.pad(valid.long().cumsum(1), (1, 0))
    length = (count - count.gather(1, start)).clamp(min=1).unsqueeze(-1)
    return ((summed - take(summed, start)) / length).to(states.dtype)


def may_be_seen(valid: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal mask (B, T, T) bool: valid positions up to the query, of its own document. True may be seen.

    valid (B, T) bool; documents (B, T): the document of each position, None where each row is one text.
    """
    seen = valid.unsqueeze(1).expand(-1, valid.shape[1], -1)
    if documents is not None:
        seen = seen & document_attention_mask(documents, causal=False).squeeze(1)
    return seen.tril()


def text_mask(valid: Tensor, documents: Tensor | None = None) -> Tensor | None:
    """Mask of the shallow layers, (B, 1, T, T) bool: `may_be_seen`, and the query itself.

    None where plain causal attention is enough: one document a row and no padding on the left.
    """
    if documents is None and bool((valid.long().cummin(1).values == valid.long()).all()):
        return None
    eye = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return (may_be_seen(valid, documents) | eye).unsqueeze(1)


def deep_mask(commit: Tensor, segment: Tensor, valid: Tensor, documents: Tensor | None = None) -> Tensor:
    """Mask of the deep layers, (B, 1, T, T) bool, True may be seen; all arguments (B, T).

    allow(q, k) = k <= q and valid_k and (g_k or segment_q = segment_k), or k = q. A concept attends to concepts alone (NULLs
    before it are of another segment), a NULL to the concepts before it and to its own tail; both within their document.
    """
    seen = commit.unsqueeze(1) | (segment.unsqueeze(2) == segment.unsqueeze(1))
    eye = torch.eye(commit.shape[1], dtype=torch.bool, device=commit.device)
    return ((seen & may_be_seen(valid, documents)) | eye).unsqueeze(1)


def document_begins(documents: Tensor) -> Tensor:
    """(B, T) bool: True at the first position of each run of equal documents (B, T)."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins


def positions_in_documents(position: Tensor, documents: Tensor) -> Tensor:
    """Positions (B, T) that start at 0 in every document (B, T)."""
    return position - torch.where(document_begins(documents), position, position.amin()).cummax(1).values


def cap_nulls(natural: Tensor, valid: Tensor, most: int, since: Tensor, begins: Tensor | None = None) -> Tensor:
    """natural commits (B, T) and forced ones, so that no run of NULLs is longer than `most`.

    A NULL is forced to commit where d = t - last natural commit, counted in valid positions, is a multiple of most + 1.
    since (B,): NULLs since the last commit before these positions, 0 at the beginning. begins (B, T) bool: first positions
    of documents.
    """
    at = valid.long().cumsum(1) - 1
    before = (-1 - since).unsqueeze(1).expand_as(at)
    if begins is not None:
        before = torch.where(begins, at - 1, before).cummax(1).values
    last = torch.where(natural, at, before).cummax(1).values
    distance = at - last
    return natural | (valid & (distance > 0) & (distance % (most + 1) == 0))


def nulls_since(commit: Tensor, valid: Tensor, since: Tensor) -> Tensor:
    """NULLs after the last commit of each row, (B,). commit, valid (B, T) bool; since (B,): NULLs before these positions."""
    after = commit.long().flip(1).cumsum(1).flip(1) == 0  # no commit from here on
    nulls = (after & valid).sum(1)
    return torch.where(commit.any(1), nulls, since + nulls)


def even_commits(position: Tensor, compression: float) -> Tensor:
    """Evenly spaced commits, one in `compression` positions: t commits where floor((t + 1) / R) > floor(t / R).

    position (B, T): t, from 0 at the beginning of a text. compression: R >= 1.
    """
    rate = 1.0 / compression
    return torch.floor((position + 1).double() * rate + 1e-9) > torch.floor(position.double() * rate + 1e-9)


def random_commits(position: Tensor, compression: float, block: int = 16) -> Tensor:
    """Pseudo-random commits, in every block as many as `even_commits`. They depend on the position alone, not on the text.

    position (B, T): from 0 at the beginning of a text. block: number of positions of a block.
    """
    first = position - position % block
    others = first.unsqueeze(-1) + torch.arange(block, device=position.device)
    rank = (_hashed(others) < _hashed(position).unsqueeze(-1)).sum(-1)
    before, after = (torch.floor(at.double() / compression + 1e-9) for at in (first, first + block))
    return rank < after - before


def _hashed(numbers: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby): 32 pseudo-random bits of each int64 number."""
    x = ((numbers + 1) * 0x9E3779B1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def accumulated_commits(increments: Tensor, total: Tensor, begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Continuous integrate-and-fire (Dong & Xu, 1905.11235): a commit wherever the cumulative sum passes an integer.

    increments (B, T) in [0, 1], total (B,): the sum before -> commits (B, T) bool and the new total; sums are of float64.
    begins (B, T) bool: first positions of documents, where the sum starts at 0.
    """
    sums = torch.cat([total.double().unsqueeze(1), increments.double()], 1).cumsum(1)
    after, before = sums[:, 1:], sums[:, :-1]
    start = torch.zeros_like(before) if begins is None else torch.where(begins, before, 0.0).cummax(1).values
    return torch.floor(after - start) > torch.floor(before - start), after[:, -1] - start[:, -1]


def draft_nulls(
    surprises: Tensor, earlier: Tensor, threshold: Tensor, valid: Tensor, begins: Tensor, since: Tensor
) -> tuple[Tensor, Tensor]:
    """Of decisions that read a draft made at the last commit: NULLs since that commit; whether it lies before these positions.

    surprises (B, T, K): of the token of each position in a draft made 1 .. K valid positions before it; earlier (B, T): in
    that of the last commit before these positions, `since` (B,) NULLs ago. A position commits where its surprise lies above the
    threshold (), behind the K-th token of a draft, and where begins (B, T) bool says that a text begins.
    Both results (B, T): int64 and bool.
    """
    most = surprises.shape[-1]
    fresh = torch.ones_like(valid[:, 0])
    nulls, of_earlier = [], []
    for t in range(valid.shape[1]):
        nulls.append(since)
        of_earlier.append(fresh)
        own = surprises[:, t].gather(-1, since.clamp(max=most - 1).unsqueeze(-1)).squeeze(-1)
        surprise = torch.where(fresh, earlier[:, t], own)
        commits = ((surprise > threshold) | (since >= most) | begins[:, t]) & valid[:, t]
        since = torch.where(valid[:, t], torch.where(commits, 0, since + 1), since)
        fresh = fresh & ~commits
    return torch.stack(nulls, 1), torch.stack(of_earlier, 1)


def renewal_nulls(
    scores: Tensor, by_distance: Tensor, valid: Tensor, most: int, since: Tensor, begins: Tensor | None = None
) -> Tensor:
    """NULLs since the last commit before each position, (B, T), of decisions that depend on this number.

    With n NULLs since the last commit, a position commits where scores (B, T) + by_distance[n] > 0, or where n >= most.
    by_distance (most + 1,); since (B,) and begins (B, T) as in `cap_nulls`.
    """
    before = []
    for t in range(scores.shape[1]):
        since = since if begins is None else torch.where(begins[:, t], 0, since)
        before.append(since)
        commits = (scores[:, t] + by_distance[since.clamp(max=most)] > 0) | (since >= most)
        since = torch.where(valid[:, t], torch.where(commits, 0, since + 1), since)
    return torch.stack(before, 1)
