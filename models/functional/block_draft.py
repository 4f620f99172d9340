r"""Drafts of several tokens from one forward pass: their loss, what is accepted of them, and noise that draws them.

A drafter proposes x_1 ... x_k from ψ_1 ... ψ_k. ψ_l is the distribution of x_l given the prefix and x_{<l}, or the noise that
drew x_{<l}. Verification token by token accepts x_l with probability min(1, q/ψ) once x_{<l} are accepted, so that

.. math:: P(\text{at least } i \text{ accepted}) = E_{x \sim q} \prod_{l \le i} \min(1, \psi_l(x_l) / q(x_l \mid x_{<l}))

The loss is .1 CE + .9 total variation, with weights that decay along the draft. It is DSpark's without its confidence term
(github.com/deepseek-ai/DeepSpec), but that DSpark's distance is twice the total variation. Noise as an input: Parallel Token
Prediction (2512.21323).
Legend: (...) any leading dimensions, N drafts, k tokens of a draft, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NOISE_BITS = 16  # binary digits of a uniform number that a network reads


def position_weights(length: int, decay: float) -> Tensor:
    """exp(-l / decay) of the positions l = 0, ..., length - 1 of a draft, (length,): a token counts once those before it do."""
    return torch.exp(-torch.arange(length) / decay)


def total_variation(logp: Tensor, logq: Tensor) -> Tensor:
    """½ Σ |p - q| = 1 - Σ min(p, q), (..., V) twice -> (...): the share of draws from one that the other rejects."""
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


class DraftLoss(NamedTuple):
    """loss (); ce, tv (): its two parts, weighted means over the positions that count."""

    loss: Tensor
    ce: Tensor
    tv: Tensor


def draft_loss(
    logp: Tensor, log_q: Tensor, tokens: Tensor, counts: Tensor, *, ce: float = 0.1, tv: float = 0.9, decay: float = 4.0
) -> DraftLoss:
    """ce · CE + tv · TV of drafts.

    logp, log_q (N, k, V): log-probabilities of the drafter, which get the gradient, and of the target, both given the tokens
    (N, k) before a position. counts (N, k) bool: positions inside the text. decay: see `position_weights`.
    A token that the drafter never proposes is left out of the cross-entropy.
    """
    weights = counts * position_weights(counts.shape[-1], decay).to(logp)
    weights = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    nll = -logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    ce_mean = (weights * torch.where(counts & nll.isfinite(), nll, 0.0)).sum()
    tv_mean = (weights * total_variation(logp, log_q)).sum()
    return DraftLoss(ce * ce_mean + tv * tv_mean, ce_mean, tv_mean)


class Survival(NamedTuple):
    """By position l, (k,) each. reached: expected drafts with l accepted tokens, inside the text; accepted: with l + 1."""

    reached: Tensor
    accepted: Tensor


def expected_survival(logp: Tensor, log_q: Tensor, tokens: Tensor, counts: Tensor) -> Survival:
    """How far drafts survive verification token by token, summed over N texts that are drawn from the target.

    Unbiased: see the head of this file. logp, log_q (N, k, V); tokens (N, k); counts (N, k) bool: positions inside the text.
    """
    own, wanted = (values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for values in (logp, log_q))
    # a token that the target never generates, as texts of others may have, ends a draft
    possible = counts & (wanted > -torch.inf)
    ratio = torch.where(possible, (own - wanted.masked_fill(~possible, 0.0)).exp().clamp(max=1.0), 0.0)
    survived = ratio.cumprod(-1)  # (N, k)
    before = torch.cat([torch.ones_like(survived[:, :1]), survived[:, :-1]], -1)
    return Survival((before * counts).sum(0), (survived * counts).sum(0))


def ranked_cdf(logp: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens (..., V) from the most probable on, and the probability of all up to each, in float64."""
    p, order = logp.double().exp().sort(stable=True, dim=-1, descending=True)
    return order, p.cumsum(-1)


def draw_with_noise(logp: Tensor, noise: Tensor) -> Tensor:
    """The token (...) at quantile noise (...) in [0, 1) of logp (..., V), tokens in the order of `ranked_cdf`.

    Where noise is uniform, the token has distribution p.
    """
    order, cdf = ranked_cdf(logp)
    rank = torch.searchsorted(cdf, noise.double().unsqueeze(-1).contiguous(), right=True)
    possible = (logp > -torch.inf).sum(-1, keepdim=True)  # a sum of probabilities may end a little below 1
    return order.gather(-1, torch.minimum(rank, possible - 1)).squeeze(-1)


def noise_that_draws(logp: Tensor, tokens: Tensor, fraction: Tensor) -> Tensor:
    """The noise (...) at a fraction in [0, 1) of the interval that draws the tokens (...) from logp (..., V).

    For tokens from p and uniform fractions the noise is uniform: the posterior of the noise, given what it drew.
    """
    order, cdf = ranked_cdf(logp)
    rank = (order == tokens.unsqueeze(-1)).long().argmax(-1, keepdim=True)
    high = cdf.gather(-1, rank).squeeze(-1)
    low = high - logp.double().gather(-1, tokens.unsqueeze(-1)).squeeze(-1).exp()
    return (low + fraction.double() * (high - low)).clamp(0.0, 1.0 - 2**-53)


def noise_bits(noise: Tensor) -> Tensor:
    """The first `NOISE_BITS` binary digits of noise (...) in [0, 1), as -1 and 1: (..., NOISE_BITS) float32."""
    scale = 2.0 ** torch.arange(1, NOISE_BITS + 1, device=noise.device, dtype=torch.float64)
    return ((noise.double().unsqueeze(-1) * scale).floor() % 2 * 2 - 1).float()
