"""The ids of a tokenizer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from models.functional.errors import UsageError


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id. `len` counts tokens, which are fewer where some ids have none."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def token_counts(ids: Iterable[Tensor], vocab_size: int) -> Tensor:
    """How often each token (V,) occurs in ids, any shapes."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for some in ids:
        counts += some.flatten().cpu().bincount(minlength=vocab_size)[:vocab_size]
    return counts


def most_frequent(counts: Tensor) -> Tensor:
    """All tokens (V,) from the most frequent one on, from counts (V,); the smaller of two that are as frequent first."""
    return counts.argsort(descending=True, stable=True)


def choose_mask_token(tokenizer: Any, wanted: str) -> str:
    """The token that stands for a mask: `wanted`, or for `auto` the tokenizer's own, else its last special token without use.

    A token is in use where it begins, ends, pads or replaces text, or where the chat template names it.
    Errors: UsageError, with the tokens to choose from, where the vocabulary has no such token.
    """
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    spare = [token for token in special if token not in used and token not in str(tokenizer.chat_template)]
    if wanted == "auto":
        if tokenizer.mask_token is not None:
            return tokenizer.mask_token
        if spare:
            return spare[-1]
    elif wanted in tokenizer.get_vocab():
        return wanted
    choice = ", ".join(spare[-5:]) or "its vocabulary holds no special token without a use"
    raise UsageError(f"model.mask_token={wanted}: the tokenizer has no such token; type one of its own ({choice})")
