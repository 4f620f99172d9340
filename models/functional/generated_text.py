"""How varied generated texts are, from their tokens alone, and how likely a judge finds them.

A model that repeats itself has a low perplexity under every judge; entropy and distinct n-grams show the repetition.
Legend: N texts, R tokens of each.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from models.functional.monitor import plug_in_entropy
from models.functional.per_token import of_totals


class JudgedText(NamedTuple):
    """A text in a judge's own tokens: ids, and which of them count."""

    ids: list[int]
    counts: list[bool]


class TextNats(NamedTuple):
    """What a judge says of N texts, (N,) each: the nats of a text's tokens together, and how many tokens these are."""

    nats: Tensor
    tokens: Tensor


def unigram_entropy(texts: Tensor) -> float:
    """Entropy in nats of the tokens of all texts (N, R) together."""
    return plug_in_entropy(texts.reshape(-1, 1))


def text_entropy(texts: Tensor) -> float:
    """Entropy in nats of the tokens within a text, averaged over the texts (N, R); at most log R, for R different tokens.

    The figure that is printed beside generative perplexity in the field, without bias correction as there.
    """
    entropies = []
    for text in texts:
        share = torch.unique(text, return_counts=True)[1].double() / len(text)
        entropies.append(-torch.xlogy(share, share).sum())
    return float(torch.stack(entropies).mean())


def distinct_ngrams(texts: Tensor, n: int) -> float:
    """Different n-grams among all n-grams of all texts (N, R), a share in (0, 1] (Li et al., 2016: distinct-n)."""
    grams = texts.unfold(1, n, 1).flatten(0, 1)
    return len(torch.unique(grams, dim=0)) / len(grams)


def counted_tokens(ids: Sequence[int], end_id: int | None) -> list[bool]:
    """Which tokens of a text its generative perplexity counts: all but the first one, and of the end tokens only the first.

    The rule of MDLM's code (Sahoo et al., 2406.07524), which Duo (2506.10892) shares. end_id: None counts every end token.
    """
    ends = [token == end_id for token in ids]
    first = ends.index(True) if any(ends) else len(ids)
    return [k > 0 and (not end or k == first) for k, end in enumerate(ends)]


def generative_perplexity(texts: TextNats) -> tuple[float, tuple[float, float] | None] | None:
    """exp of the mean nats over the tokens of all texts, and its 95 % interval (`per_token`), None for one text.

    None where there are no tokens.
    """
    found = of_totals(texts.nats.double(), texts.tokens.double())
    if found is None or found.half is None:
        return None if found is None else (math.exp(found.mean), None)
    low, high = found.mean - found.half, found.mean + found.half
    return math.exp(found.mean), (math.exp(low), math.exp(high))


def perplexity_at_entropy(points: Sequence[tuple[float, float]], entropy: float) -> float | None:
    """Perplexity at an entropy, on the line through the two neighbouring (entropy, perplexity), in log perplexity.

    points: of one generator at several temperatures, in any order. None beyond them: nothing is extrapolated.
    """
    for (low, below), (high, above) in pairwise(sorted(points)):
        if low <= entropy <= high:
            share = (entropy - low) / (high - low) if high > low else 0.0
            return math.exp((1 - share) * math.log(below) + share * math.log(above))
    return None
