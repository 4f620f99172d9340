"""Is a q* decoder exact? By enumerating all outcomes of its draws, and by a G-test of many of its texts.

Legend: T texts of a list, P prompt columns, R response columns, V vocabulary.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import chi2, power_divergence
from torch import Generator, Tensor, nn

from models.interfaces.scores import BlockProposal, StateScores
from models.speculative.decoder import QStarDecoder
from models.speculative.distribution import MixtureDist
from models.speculative.random_source import TorchRandomSource, enumerate_outcomes
from models.speculative.scores import CausalScores
from models.speculative.state import Scores

MIN_EXPECTED = 5.0
NOISE = 1e-5  # of a sum of probabilities in float32


def g_test(counts: Tensor, probability: Tensor) -> float | None:
    """p-value of counts (T,) of n samples under probability (T,); None where only one cell is left, which shows nothing.

    Cells with an expected count below 5 are pooled. G = 2 Σ O ln(O / E) is divided by Williams' correction
    1 + (Σ 1/p - 1) / (6 n (k - 1)), without which it is too large for small expected counts (Williams, Biometrika 1976).
    """
    n = int(counts.sum())
    expected = n * probability.double().numpy()
    seen = counts.double().numpy()
    rare = expected < MIN_EXPECTED
    expected = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(seen[~rare], seen[rare].sum())
    if expected[-1] <= 0:
        if seen[-1] > 0:  # a text of probability 0 was generated
            return 0.0
        expected, seen = expected[:-1], seen[:-1]
    if len(expected) < 2:
        return None
    expected = expected * seen.sum() / expected.sum()
    freedom = len(expected) - 1
    statistic = float(power_divergence(seen, expected, lambda_="log-likelihood").statistic)
    correction = 1 + ((n / expected).sum() - 1) / (6 * n * freedom)
    return float(chi2.sf(statistic / correction, freedom))


@torch.no_grad()
def text_log_probs(
    theta: nn.Module, target: nn.Module, mixture: MixtureDist, prompt: Tensor, texts: Tensor, vocab_size: int
) -> Tensor:
    """log q*(text | prompt) (T,) of texts (T, R) after one prompt (P,), token by token from both models' logits.

    vocab_size: ids from there on are never generated.
    """
    ids = torch.cat([prompt.expand(len(texts), -1), texts], -1)
    lengths = torch.full((len(ids),), len(prompt), device=ids.device)
    both = [
        mixture.tempered(CausalScores(model, vocab_size)(ids, lengths, texts.shape[1])) for model in (theta, target)
    ]
    return mixture(*both).log_q.gather(-1, texts.unsqueeze(-1)).squeeze(-1).double().sum(-1)


@torch.no_grad()
def g_test_of(
    decoder: QStarDecoder, prompt: Tensor, texts: Tensor, n: int, generator: Generator, batch: int = 1024
) -> float | None:
    """p-value of n generated texts after a prompt (P,) under q* of the listed texts (T, R); all others are one cell."""
    log_q = text_log_probs(decoder.theta, decoder.target, decoder.mixture, prompt, texts, decoder.vocab_size)
    cell = {tuple(text): k for k, text in enumerate(texts.tolist())}
    counts = torch.zeros(len(texts) + 1)
    for start in range(0, n, batch):
        rows = min(batch, n - start)
        prompts = prompt.expand(rows, -1)
        lengths = torch.full((rows,), len(prompt), device=prompt.device)
        generated = decoder.decode(prompts, lengths, texts.shape[1], TorchRandomSource(generator)).tokens
        for text in generated.tolist():
            counts[cell.get(tuple(text), len(texts))] += 1
    rest = 1.0 - float(log_q.exp().sum())
    rest = rest if rest > NOISE else 0.0
    return g_test(counts, torch.cat([log_q.exp().cpu(), torch.tensor([rest], dtype=torch.float64)]))


@torch.no_grad()
def probable_texts(decoder: QStarDecoder, prompt: Tensor, length: int, count: int) -> Tensor:
    """At most `count` texts (T, length) after a prompt (P,): the most probable ones that a beam search under q* finds."""
    models = [CausalScores(model, decoder.vocab_size) for model in (decoder.theta, decoder.target)]
    texts, log_p = prompt.new_zeros(1, 0), torch.zeros(1, dtype=torch.float64, device=prompt.device)
    for _ in range(length):
        prefixes = torch.cat([prompt.expand(len(texts), -1), texts], -1)
        total = (log_p.unsqueeze(-1) + _next_token_log_q(decoder.mixture, models, prefixes).double()).flatten()
        log_p, best = total.topk(min(count, int((total > -torch.inf).sum())))
        rows, tokens = best // decoder.vocab_size, best % decoder.vocab_size
        texts = torch.cat([texts[rows], tokens.unsqueeze(-1)], -1)
    return texts


def without_ends(decoder: QStarDecoder) -> QStarDecoder:
    """The same decoder, whose texts go on behind an end token: every text has the asked length."""
    endless = copy.copy(decoder)
    endless.end_ids = ()
    return endless


class _Restricted:
    """Scores of a model that may generate some tokens only, renormalised."""

    def __init__(self, scores: Scores, tokens: Tensor) -> None:
        self.scores, self.tokens = scores, tokens

    def __call__(self, ids: Tensor, lengths: Tensor, count: int) -> Tensor:
        return _restricted(self.scores(ids, lengths, count), self.tokens)

    def keep_states(self, layers: Sequence[int]) -> None:
        cast(StateScores, self.scores).keep_states(layers)

    def states_before(self, ids: Tensor, ends: Tensor, window: int) -> tuple[Tensor, Tensor]:
        return cast(StateScores, self.scores).states_before(ids, ends, window)


class _RestrictedBlocks:
    """A drafter of blocks that may propose some tokens only, renormalised."""

    def __init__(self, drafter: Any, tokens: Tensor) -> None:
        self.drafter, self.tokens = drafter, tokens
        self.block_length, self.window, self.state_layers = drafter.block_length, drafter.window, drafter.state_layers

    def propose(self, states, read, last, size, draws, shape) -> BlockProposal:
        return self.drafter.propose(states, read, last, size, draws, lambda logp: shape(_restricted(logp, self.tokens)))


def _restricted(logp: Tensor, tokens: Tensor) -> Tensor:
    """logp (..., V) of some tokens (n,) alone, renormalised."""
    allowed = torch.full_like(logp, -torch.inf)
    allowed[..., tokens] = logp[..., tokens]
    return allowed.log_softmax(-1)


@torch.no_grad()
def enumeration_error(decoder: QStarDecoder, prompt: Tensor, vocabulary: int = 2, gamma: int = 2) -> float:
    """Largest |P(text) - Π q*| over all texts of gamma + 1 of the `vocabulary` most probable tokens, in float64.

    The decoder's own loop runs once for every outcome of its draws. Texts are one token longer than drafts, to include the rule
    for the position after a draft that is accepted whole. A decoder that drafts less than gamma tokens is taken as it is.
    Not for a drafter that draws with uniform noise, of which only a grid could be enumerated.
    """
    # 1. the decoder in float64, restricted to a few tokens
    exact = without_ends(decoder)
    # one copy of all, so that what they share stays shared
    parts = (decoder.theta, decoder.target, decoder.assistant)
    exact.theta, exact.target, exact.assistant = copy.deepcopy(parts)
    for part in (exact.theta, exact.target, exact.assistant):
        if part is not None:
            part.double()
    exact.gamma = gamma if decoder.gamma == "auto" else min(gamma, decoder.gamma)
    exact.options = replace(decoder.options, costs="parameters")
    models = [CausalScores(model, decoder.vocab_size) for model in (exact.theta, exact.target)]
    tokens = _next_token_log_q(decoder.mixture, models, prompt[None])[0].topk(vocabulary).indices
    exact.make_scores = lambda model, vocab_size: _Restricted(decoder.make_scores(model, vocab_size), tokens)
    if decoder.scheme == "block_drafter":
        exact.assistant = cast(Any, _RestrictedBlocks(exact.assistant, tokens))
    # 2. the distribution of what it generates; n-grams propose the token that ends the prompt twice
    prompt = torch.cat([prompt, tokens[:1].expand(2)])
    # a drafter of blocks begins behind the first token
    length = gamma + 1 + (decoder.scheme == "block_drafter")
    lengths = torch.tensor([len(prompt)], device=prompt.device)
    found = dict.fromkeys(itertools.product(tokens.tolist(), repeat=length), 0.0)
    for probability, out in enumerate_outcomes(lambda source: exact.decode(prompt[None], lengths, length, source)):
        found[tuple(out.tokens[0].tolist())] += probability
    # 3. the distribution q*, token by token
    restricted = [_Restricted(scores, tokens) for scores in models]
    worst = 0.0
    for text, probability in found.items():
        prefix, log_q = prompt, 0.0
        for token in text:
            log_q += _next_token_log_q(decoder.mixture, restricted, prefix[None])[0, token].item()
            prefix = torch.cat([prefix, prefix.new_tensor([token])])
        worst = max(worst, abs(probability - math.exp(log_q)))
    return worst


def _next_token_log_q(mixture: MixtureDist, models: Sequence[Scores], prefixes: Tensor) -> Tensor:
    """log q* (N, V) of the token after each of prefixes (N, P), from the scores of theta and target."""
    lengths = torch.full((len(prefixes),), prefixes.shape[1], device=prefixes.device)
    return mixture(*(mixture.tempered(scores(prefixes, lengths, 1)) for scores in models)).log_q[:, 0]
