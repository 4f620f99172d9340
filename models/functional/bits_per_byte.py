r"""Nats per token, perplexity and bits per byte of a text, from sums that may be taken over batches of any size.

Bits per byte compare models with different tokenizers: both nats and bytes are those of tokens with text, so special
tokens such as `<bos>` count in neither.
"""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from models.functional.precision import at_least_float32


class NllSums(NamedTuple):
    """float64 scalars: nats of all targets and their number; nats and UTF-8 bytes of the targets with text."""

    nats: Tensor
    tokens: Tensor
    text_nats: Tensor
    text_bytes: Tensor

    def plus(self, other: "NllSums") -> "NllSums":
        """The sums over both."""
        return NllSums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] in nats: logits (..., V), labels (...) -> (...), in float32 at least."""
    nll = F.cross_entropy(at_least_float32(logits).flatten(0, -2), labels.flatten(), reduction="none")
    return nll.view(labels.shape)


def nll_sums(nll: Tensor, target_bytes: Tensor) -> NllSums:
    """nll (...) in nats of each target, target_bytes (...) of its text (0: a special token)."""
    nats, of_text = nll.double(), target_bytes > 0
    count = nats.new_tensor(nats.numel())
    return NllSums(nats.sum(), count, nats[of_text].sum(), target_bytes.sum().double())


def nats_per_token(sums: NllSums) -> Tensor:
    return sums.nats / sums.tokens


def perplexity(sums: NllSums) -> Tensor:
    """exp of the mean nats per token."""
    return nats_per_token(sums).exp()


def bits_per_byte(sums: NllSums) -> Tensor:
    r""":math:`\sum nats / (\ln 2 \cdot \sum bytes)` over the tokens with text."""
    return sums.text_nats / (math.log(2) * sums.text_bytes)
