r"""Texts whose tokens are all drawn in one forward pass, given a plan z.

.. math:: p(x \mid z) = \prod_{l \le e(x)} p(x_l \mid z), \qquad e(x) \text{ the position of the first end token}

What comes after the first end token is no part of a text: these products sum to 1 over the texts that are cut there.
Legend: B batch, R text columns, V vocabulary, Z plans, N texts.
"""

import torch
from torch import Generator, Tensor

from models.functional.masked_lm import hide_exactly, stratified_count
from models.functional.plan_information import entropy
from models.functional.uniform import uniform

SURE = 1e-3  # nats: a position with less entropy is not redrawn


def hidden_tokens(counted: Tensor, whole: float, generator: Generator) -> Tensor:
    """Which tokens of each text are hidden in training, (B, R) bool, among those that count, (B, R) bool.

    With probability `whole` all of a text's n tokens; else a number from 1 to n, each as likely, and a uniform choice: the law
    of tokens that are hidden with probability t ~ U(0, 1) each, where at least one is.
    """
    size = counted.sum(-1)
    all_of_them = uniform(len(counted), generator=generator) < whole
    count = torch.where(all_of_them, size, stratified_count(size, 0, 1, generator))
    return hide_exactly(counted, count, generator)


def token_entropy(logits: Tensor) -> Tensor:
    """H(softmax(logits)) in nats: (..., V) -> (...)."""
    return entropy(logits.softmax(-1))


def least_certain(entropies: Tensor, counted: Tensor, share: float) -> Tensor:
    """The share of a text's tokens, rounded up, that had the highest entropy when they were drawn; (B, R) bool.

    entropies (B, R) nats; counted (B, R) bool. Tokens of less than `SURE` nats are never among them. Mask-Predict
    (Ghazvininejad et al., 1904.09324) takes those of the lowest probability; the entropy does not depend on which token was
    drawn, so that an improbable one stays as likely as it was.
    """
    rank = entropies.masked_fill(~counted, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    # in double precision, and a little less than that: 0.15 of 100 tokens are 15
    most = (share * counted.sum(-1, keepdim=True).double() - 1e-9).ceil()
    return counted & (rank < most) & (entropies > SURE)


def nll_of_texts(log_p: Tensor, texts: Tensor, counted: Tensor) -> Tensor:
    r"""-log p(x | z) = -sum_l log p(x_l | z) of every text given every plan, nats: (N, Z).

    log_p (Z, R, V): of one forward pass a plan; texts (N, R); counted (N, R) bool: the tokens that are part of a text.
    """
    found = log_p.new_zeros(len(texts), len(log_p))
    for column in range(texts.shape[1]):
        found -= log_p[:, column, texts[:, column]].T.masked_fill(~counted[:, column, None], 0.0)
    return found


def log_mixture(log_prior: Tensor, log_text: Tensor) -> Tensor:
    r"""log p(x | u) = log sum_z p(z | u) p(x | z), nats in float64, of all Z plans: (N, Z) and (N, Z) -> (N,)."""
    return (log_prior.double() + log_text.double()).logsumexp(-1)


def responsibilities(log_prior: Tensor, log_text: Tensor) -> Tensor:
    r"""p(z | u, x) = p(z | u) p(x | z) / p(x | u), float64, of all Z plans: (N, Z) and (N, Z) -> (N, Z)."""
    return (log_prior.double() + log_text.double()).softmax(-1)


def total_correlation_given(texts: Tensor, probability: Tensor, codes: Tensor, counted: Tensor | None = None) -> float:
    r"""The least KL in nats from the truth to texts that are written in one forward pass, given a code z = f(x).

    .. math:: \sum_l P(l \le e) \, H(x_l \mid z, l \le e) - H(x \mid z)

    For texts of one length it is the total correlation TC(x | z). texts (N, R): all texts of positive probability (N,); codes
    (N,): the number of each text's code; counted (N, R) bool: the tokens up to the first end, e. None: all.
    """
    weight = probability.double() / probability.sum()
    given = 0.0
    everywhere = torch.ones_like(texts, dtype=torch.bool) if counted is None else counted
    for column, alive in enumerate(everywhere.unbind(-1)):
        if share := float(weight[alive].sum()):
            both = torch.stack([texts[alive, column], codes[alive]], -1)
            given += share * _entropy_given(both, codes[alive], weight[alive] / share)
    return given - _entropy_given(texts, codes, weight)


def _entropy_given(rows: Tensor, codes: Tensor, weight: Tensor) -> float:
    """H(rows | z) in nats, of rows (N, F) that determine their codes (N,): H(rows, z) - H(z)."""
    return float(_entropy_of(rows, weight) - _entropy_of(codes.unsqueeze(-1), weight))


def _entropy_of(rows: Tensor, weight: Tensor) -> Tensor:
    """H in nats of rows (N, F) whose probabilities (N,) add up where rows are equal."""
    _, number = torch.unique(rows, dim=0, return_inverse=True)
    return entropy(torch.zeros(int(number.max()) + 1, dtype=weight.dtype).index_add_(0, number, weight))
