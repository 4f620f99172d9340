"""Is a q* decoder exact? By enumerating all that its draws can do, and by a G-test of many of its texts.

Legend: T texts that can be said, P prompt columns, R response columns, n samples, V vocabulary.
"""

import copy
import itertools
import math

import numpy as np
import torch
from scipy.stats import power_divergence
from torch import Generator, Tensor, nn

from models.speculative.decoder import QStarDecoder
from models.speculative.distribution import MixtureDist
from models.speculative.random_source import TorchRandomSource, enumerate_outcomes
from models.speculative.scores import CausalScores
from models.speculative.state import Scores

LEAST_EXPECTED = 5.0


def g_test(counts: Tensor, probability: Tensor) -> float:
    """p-value of counts (T,) of n samples under probability (T,); what is left of both to 1 and n is one more cell.

    Cells that expect fewer than 5 are counted as one.
    """
    n = int(counts.sum())
    expected = n * probability.double().numpy()
    seen = counts.double().numpy()
    rare = expected < LEAST_EXPECTED
    expected = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(seen[~rare], seen[rare].sum())
    if expected[-1] <= 0:
        if seen[-1] > 0:  # said what can never be said
            return 0.0
        expected, seen = expected[:-1], seen[:-1]
    if len(expected) < 2:
        return 1.0
    return float(power_divergence(seen, expected * seen.sum() / expected.sum(), lambda_="log-likelihood").pvalue)


@torch.no_grad()
def law_of_texts(
    theta: nn.Module, target: nn.Module, mixture: MixtureDist, prompt: Tensor, texts: Tensor, words: int
) -> Tensor:
    """log q*(text | prompt) (T,) of texts (T, R) after one prompt (P,), token by token from both models' own numbers.

    words: the vocabulary; ids from there on are never said.
    """
    ids = torch.cat([prompt.expand(len(texts), -1), texts], -1)
    lengths = torch.full((len(ids),), len(prompt), device=ids.device)
    both = [mixture.tempered(CausalScores(model, words)(ids, lengths, texts.shape[1])) for model in (theta, target)]
    return mixture(*both).log_q.gather(-1, texts.unsqueeze(-1)).squeeze(-1).double().sum(-1)


@torch.no_grad()
def g_test_of(
    decoder: QStarDecoder, prompt: Tensor, texts: Tensor, n: int, generator: Generator, batch: int = 1024
) -> float:
    """p-value of n texts that the decoder says after a prompt (P,) against the law of all `texts` (T, R) and of the rest."""
    log_q = law_of_texts(decoder.theta, decoder.target, decoder.mixture, prompt, texts, decoder.vocab_size)
    place = {tuple(text): k for k, text in enumerate(texts.tolist())}
    counts = torch.zeros(len(texts) + 1)
    for start in range(0, n, batch):
        rows = min(batch, n - start)
        prompts = prompt.expand(rows, -1)
        lengths = torch.full((rows,), len(prompt), device=prompt.device)
        said = decoder.decode(prompts, lengths, texts.shape[1], TorchRandomSource(generator)).tokens
        for text in said.tolist():
            counts[place.get(tuple(text), len(texts))] += 1
    rest = max(0.0, 1.0 - float(log_q.exp().sum()))
    return g_test(counts, torch.cat([log_q.exp().cpu(), torch.tensor([rest], dtype=torch.float64)]))


class _Among:
    """Scores of a model that may say a few words only."""

    def __init__(self, scores: Scores, words: Tensor) -> None:
        self.scores, self.words = scores, words

    def __call__(self, ids: Tensor, lengths: Tensor, count: int) -> Tensor:
        logp = self.scores(ids, lengths, count)
        kept = torch.full_like(logp, -torch.inf)
        kept[..., self.words] = logp[..., self.words]
        return kept.log_softmax(-1)


@torch.no_grad()
def enumeration_error(decoder: QStarDecoder, prompt: Tensor, words: int = 2, length: int = 2, gamma: int = 2) -> float:
    """Largest |P(text) - Π q*| over the texts of `length` tokens from the `words` most probable ones, in float64.

    The decoder's own loop is run once for every way that its draws can fall.
    """
    exact = copy.copy(decoder)
    exact.theta, exact.target = (copy.deepcopy(model).double() for model in (decoder.theta, decoder.target))
    exact.assistant = None if decoder.assistant is None else copy.deepcopy(decoder.assistant).double()
    exact.eos_id, exact.gamma = None, min(gamma, decoder.gamma) if decoder.gamma != "auto" else gamma
    ids, lengths = prompt.unsqueeze(0), torch.tensor([len(prompt)], device=prompt.device)
    plain = [CausalScores(model, decoder.vocab_size) for model in (exact.theta, exact.target)]
    first = decoder.mixture(*(decoder.mixture.tempered(scores(ids, lengths, 1)) for scores in plain)).log_q[0, 0]
    some = first.topk(words).indices
    kind = decoder.kind
    exact.kind = lambda model, size: _Among(kind(model, size), some)
    found = dict.fromkeys(itertools.product(some.tolist(), repeat=length), 0.0)
    for probability, out in enumerate_outcomes(lambda rng: exact.decode(ids, lengths, length, rng)):
        found[tuple(out.tokens[0].tolist())] += probability
    few = [_Among(scores, some) for scores in plain]
    worst = 0.0
    for text, probability in found.items():
        said, total = prompt.tolist(), 0.0
        for token in text:
            here = torch.tensor([said], device=prompt.device)
            n = torch.tensor([len(said)], device=prompt.device)
            mixture = decoder.mixture(*(decoder.mixture.tempered(scores(here, n, 1)) for scores in few))
            total += mixture.log_q[0, 0, token].item()
            said.append(token)
        worst = max(worst, abs(probability - math.exp(total)))
    return worst
