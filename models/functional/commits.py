r"""Commits: which positions of a text become concepts, packed for a stack that reads concepts alone.

A position either commits (g_t = 1) or is NULL. tau(t) is the last commit at or before t; the deep stack at t reads the
concepts up to tau(t) and the tail, the NULL positions tau(t)+1 .. t. All of it in one forward with exactly T slots.
Legend: B batch, T positions, M packed concepts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.functional.attention import document_attention_mask


class Packing(NamedTuple):
    """index (B, M): positions of the commits, in order, then others; real (B, M): which of them are commits.

    segment (B, T): commits at or before a position; slot (B, T): the packed position of tau(t), 0 where there is none yet.
    """

    index: Tensor
    real: Tensor
    segment: Tensor
    slot: Tensor


def pack_commits(commit: Tensor) -> Packing:
    """commit (B, T) bool, False on padding -> `Packing` with M = the most commits of any row, at least 1.

    Rows with fewer are filled up behind their last commit, so that a stack that is causal in the packed order needs no
    padding mask.
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
    """The last of so many concepts, (B, M, D) and count (B, T) -> (B, T, D); 0 where there is none yet.

    documents (B, T) and owners (B, M), the documents of concepts: 0 too where the last one is of another document.
    """
    slot, there = (count - 1).clamp(min=0), count > 0
    if documents is not None:
        there = there & (owners.gather(1, slot) == documents)
    return take(concepts, slot) * there.unsqueeze(-1)


def tail_means(states: Tensor, commit: Tensor, valid: Tensor, documents: Tensor | None = None) -> Tensor:
    """The mean of the tail before each position and, at the end, of the one behind the last, (B, T + 1, D); 0 of an empty one.

    states (B, T, D); commit, valid (B, T) bool; documents (B, T): a tail is of one of them. Sums are of float64: they are
    differences of running ones.
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
    """What any stack may see, (B, T, T) bool: real positions up to the query, of its own document where a row has several.

    valid (B, T) bool; documents (B, T): which one a position belongs to, None where each row is one text.
    """
    seen = valid.unsqueeze(1).expand(-1, valid.shape[1], -1)
    if documents is not None:
        seen = seen & document_attention_mask(documents, causal=False).squeeze(1)
    return seen.tril()


def text_mask(valid: Tensor, documents: Tensor | None = None) -> Tensor | None:
    """What the shallow stack may see, (B, 1, T, T) bool: `may_be_seen`, and the query itself.

    None where nothing that is padding stands before something real: causal attention is then enough.
    """
    if documents is None and bool((valid.long().cummin(1).values == valid.long()).all()):
        return None
    eye = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return (may_be_seen(valid, documents) | eye).unsqueeze(1)


def deep_mask(commit: Tensor, segment: Tensor, valid: Tensor, documents: Tensor | None = None) -> Tensor:
    """What the deep stack may see, (B, 1, T, T) bool, True = may be seen; all (B, T).

    allow(q, k) = k <= q and valid_k and (g_k or segment_q = segment_k), or k = q. A concept sees concepts alone (a NULL
    position before it has another segment), a tail position the concepts before it and its own tail; both of their own
    document.
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
    """Positions (B, T) counted anew from 0 in every document; both (B, T)."""
    return position - torch.where(document_begins(documents), position, position.amin()).cummax(1).values


def cap_nulls(natural: Tensor, valid: Tensor, most: int, since: Tensor, begins: Tensor | None = None) -> Tensor:
    """natural commits (B, T) with a forced one wherever more than `most` NULLs would follow each other.

    d = t - last natural commit, t counted over valid positions; forced where NULL and d is a multiple of most + 1.
    since (B,): NULLs in a row before the first of these positions; 0 at the beginning of a text. begins (B, T) bool: where
    a text begins.
    """
    at = valid.long().cumsum(1) - 1
    before = (-1 - since).unsqueeze(1).expand_as(at)
    if begins is not None:
        before = torch.where(begins, at - 1, before).cummax(1).values
    last = torch.where(natural, at, before).cummax(1).values
    distance = at - last
    return natural | (valid & (distance > 0) & (distance % (most + 1) == 0))


def nulls_since(commit: Tensor, valid: Tensor, since: Tensor) -> Tensor:
    """How many NULLs in a row each row of commit (B, T) ends with, (B,), counting `since` (B,) from before."""
    after = commit.long().flip(1).cumsum(1).flip(1) == 0  # no commit from here on
    nulls = (after & valid).sum(1)
    return torch.where(commit.any(1), nulls, since + nulls)


def even_commits(position: Tensor, compression: float) -> Tensor:
    """One commit in `compression` positions, spread evenly: of N tokens the M that make floor((t + 1) M / N) grow.

    position (B, T): positions counted from the text's beginning. compression = N / M >= 1.
    """
    rate = 1.0 / compression
    return torch.floor((position + 1).double() * rate + 1e-9) > torch.floor(position.double() * rate + 1e-9)


def random_commits(position: Tensor, compression: float, block: int = 16) -> Tensor:
    """As many commits in every `block` positions as `even_commits` has, at positions that a hash draws; the same in every text.

    position (B, T): positions counted from the text's beginning. What is read has no say in it.
    """
    first = position - position % block
    others = first.unsqueeze(-1) + torch.arange(block, device=position.device)
    rank = (_hashed(others) < _hashed(position).unsqueeze(-1)).sum(-1)
    before, after = (torch.floor(at.double() / compression + 1e-9) for at in (first, first + block))
    return rank < after - before


def _hashed(numbers: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby): 32 bits of each number of int64 in which neighbours have nothing in common."""
    x = ((numbers + 1) * 0x9E3779B1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def accumulated_commits(increments: Tensor, total: Tensor, begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integrate and fire (Dong & Xu, 1905.11235): a commit wherever the running sum passes a whole number.

    increments (B, T) in [0, 1], total (B,) from before -> commits (B, T) bool and the new total, both summed in float64.
    begins (B, T) bool: where a text begins, and with it another sum.
    """
    sums = torch.cat([total.double().unsqueeze(1), increments.double()], 1).cumsum(1)
    after, before = sums[:, 1:], sums[:, :-1]
    start = torch.zeros_like(before) if begins is None else torch.where(begins, before, 0.0).cummax(1).values
    return torch.floor(after - start) > torch.floor(before - start), after[:, -1] - start[:, -1]


def renewal_nulls(
    scores: Tensor, by_distance: Tensor, valid: Tensor, most: int, since: Tensor, begins: Tensor | None = None
) -> Tensor:
    """NULLs in a row before each position, (B, T), where each decision depends on how long ago the last commit was.

    A position commits where scores (B, T) + by_distance[NULLs in a row before it] > 0, or where more than `most` NULLs would
    follow each other. by_distance (most + 1,); since (B,) and begins (B, T) as in `cap_nulls`.
    """
    before = []
    for t in range(scores.shape[1]):
        since = since if begins is None else torch.where(begins[:, t], 0, since)
        before.append(since)
        commits = (scores[:, t] + by_distance[since.clamp(max=most)] > 0) | (since >= most)
        since = torch.where(valid[:, t], torch.where(commits, 0, since + 1), since)
    return torch.stack(before, 1)
