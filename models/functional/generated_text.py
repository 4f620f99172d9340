"""How varied generated texts are, from their tokens alone.

A model that repeats itself has a low perplexity under every judge; entropy and distinct n-grams show the repetition.
Legend: N texts, R tokens of each.
"""

import torch
from torch import Tensor

from models.functional.monitor import plug_in_entropy


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
