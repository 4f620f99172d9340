r"""Codes of a text that are not learned: baselines of learned plans at the same rate.

Legend: B texts, R tokens, V vocabulary, S positions of a code.
"""

import torch
from torch import Tensor

LARGEST = 2**63 - 1
MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def leading_tokens(text: Tensor, count: int) -> Tensor:
    """The first `count` tokens of texts (B, R), (B, count)."""
    return text[:, :count]


def surprising_tokens(text: Tensor, surprisal: Tensor, count: int) -> Tensor:
    """The `count` tokens of each text (B, R) with the largest surprisal (V,), in reading order: (B, count).

    Among equal ones the earlier tokens.
    """
    positions = surprisal[text].argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
    return text.gather(-1, positions)


def random_hash(text: Tensor, sizes: Tensor) -> Tensor:
    """A pseudo-random code of each text (B, R), position s below sizes[s]: (B, S), the same for equal texts.

    Bits are mixed after every token as in SplitMix64 (Steele et al., 2014); each position starts from another number.
    """
    state = torch.arange(1, 1 + len(sizes), device=text.device).expand(len(text), -1)
    for token in text.unbind(-1):
        state = _mixed(state + token.unsqueeze(-1) + 1)
    return (state & LARGEST) % sizes.to(text.device)


def _mixed(state: Tensor) -> Tensor:
    """SplitMix64 of int64; products wrap around."""
    for shift, factor in MIXING:
        state = (state ^ ((state >> shift) & (LARGEST >> (shift - 1)))) * factor
    return state ^ ((state >> 31) & (LARGEST >> 30))


def unigram_surprisal(tokens: Tensor, vocab_size: int) -> Tensor:
    """-log of each token's share of tokens (...), with one added to each count, nats: (V,)."""
    counts = torch.bincount(tokens.flatten(), minlength=vocab_size).double() + 1
    return counts.sum().log() - counts.log()
