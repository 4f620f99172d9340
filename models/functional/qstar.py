r"""q*: the geometric mixture of two models at equal KL divergence from both.

.. math:: q_\alpha(y) = \frac{\pi_\theta(y)^\alpha \pi_t(y)^{1-\alpha}}{Z(\alpha)}

With d = log π_t - log π_θ and b = 1 - α, K(b) = log Σ π_θ e^{b d} is convex, K'(b) = E_q d = KL(q‖π_θ) - KL(q‖π_t) and
K''(b) = Var_q d. The α at which both KLs agree is therefore the minimiser of a one-dimensional convex function, and the common
KL is the Chernoff information C = -K(b) (Nielsen, Revisiting Chernoff Information with Likelihood Ratio Exponential Families,
Entropy 2022, 24(10):1400).
Legend: (...) any leading dimensions, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.functional.errors import UsageError

CACHED_NUMBERS = 2**18  # log-probabilities of a model that stay in a CPU's cache


class Alpha(NamedTuple):
    """alpha (...): weight on π_θ. chernoff (...): C = -log Z at alpha, nats. log_z (...): log Z(alpha).

    iterations: passes over the vocabulary, beside two at the ends of [0, 1] where supports differ.
    """

    alpha: Tensor
    chernoff: Tensor
    log_z: Tensor
    iterations: int


class _Tilted(NamedTuple):
    """π_θ e^{b d} at b (N,). weight (N, V): scaled to a largest of 1; log_z, mean, spread (N,) float64: K, K', sqrt E d²."""

    weight: Tensor
    log_z: Tensor
    mean: Tensor
    spread: Tensor


def no_common_token(logp_theta: Tensor, logp_t: Tensor) -> UsageError:
    """The error where q* does not exist."""
    if bool((logp_theta.isnan() | logp_t.isnan()).any()):
        return UsageError("a model gives NaN: load it in float32 or bfloat16, or go back to a good checkpoint of it")
    return UsageError(
        "the two models allow no common token: q* does not exist; loosen top_k / top_p or use one vocabulary"
    )


def log_ratio(logp_theta: Tensor, logp_t: Tensor) -> tuple[Tensor, Tensor]:
    """d = log π_t - log π_θ and the common support, both (..., V); d is 0 outside of it, where 0 · -inf would be NaN.

    Raises UsageError where a row has no token that both models allow.
    """
    support = torch.isfinite(logp_theta) & torch.isfinite(logp_t)
    if not bool(support.any(-1).all()):
        raise no_common_token(logp_theta, logp_t)
    return torch.where(support, logp_t - logp_theta, 0.0), support


def _tilt(logp_theta: Tensor, d: Tensor, b: Tensor) -> _Tilted:
    """One pass over (N, V) in the precision given; logp_theta is -inf off the support."""
    logits = torch.addcmul(logp_theta, d, b.unsqueeze(-1).to(d.dtype))
    top = logits.amax(-1, keepdim=True)
    weight = logits.sub_(top).exp_()
    total = weight.sum(-1).double()
    first = weight * d
    mean = first.sum(-1).double() / total
    spread = (first.mul_(d).sum(-1).double() / total).sqrt()
    return _Tilted(weight, top.squeeze(-1).double() + total.log(), mean, spread)


def _halley_step(weight: Tensor, d: Tensor) -> Tensor:
    """What Halley's method on h = log A - log B subtracts from b (N,).

    K' = (A - B)/Z with A = Σ π_θ e^{b d} d+ and B = Σ π_θ e^{b d} d-, so K' = 0 where h = 0. NaN where A or B underflows.
    """
    sums = []
    for part in (d.clamp(min=0), (-d).clamp(min=0)):
        weighted = weight
        for _ in range(3):
            weighted = weighted * part
            sums.append(weighted.sum(-1).double())
    a1, a2, a3, b1, b2, b3 = sums
    height = a1.log() - b1.log()
    slope = a2 / a1 + b2 / b1
    curvature = a3 / a1 - (a2 / a1).square() - b3 / b1 + (b2 / b1).square()
    return 2 * height * slope / (2 * slope.square() - height * curvature)


def _tilt_and_step(logp_theta: Tensor, d: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_z, mean, spread and the Halley step, (N,) each; compiled, it is one pass that writes no tensor of (N, V)."""
    here = _tilt(logp_theta, d, b)
    return here.log_z, here.mean, here.spread, _halley_step(here.weight, d)


@cache
def _fused_pass() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    return torch.compile(_tilt_and_step, dynamic=True)


def solve_alpha(
    logp_theta: Tensor, logp_t: Tensor, *, tolerance: float = 5e-7, most: int = 60, fused: bool | None = None
) -> Alpha:
    """The α at which KL(q‖π_θ) = KL(q‖π_t), for every row: Halley's method on h = log A - log B (`_halley_step`).

    logp_theta, logp_t (..., V): log-probabilities, -inf where a token is not allowed; any float type.
    h increases with b and is nearly straight, even where a token is far more probable under one model and K' jumps. A step
    that leaves the shrinking bracket is replaced by bisection.
    Precision: float32 until |K'| <= 1e-5 (1 + sqrt E d²), then float64 until |K'| <= tolerance. The KL gap K' is what
    converges, not α; float32 sums alone leave gaps up to 2e-5. Both divergences are those of the normalised models.
    Truncated supports (S the common one): an interior root exists iff Σ_S π_θ d < 0 < Σ_S π_t d. Otherwise α = 1 or 0, q is
    that model restricted to S, and the two KLs differ while C = -log Z still holds. d = 0 on S gives 1/2.
    fused: passes compiled by torch, which is faster on a GPU; None compiles where the tensors are on one.
    Raises UsageError where a row has no common token.
    """
    shape, vocabulary = logp_theta.shape[:-1], logp_theta.shape[-1]
    theta, target = (logp.reshape(-1, vocabulary) for logp in (logp_theta, logp_t))
    on_cpu = theta.device.type == "cpu"
    # on a CPU, so few rows at a time that they stay in its cache through all passes
    rows = max(1, CACHED_NUMBERS // vocabulary) if on_cpu else max(1, len(theta))
    blocks = zip(theta.split(rows), target.split(rows), strict=True)
    fused = theta.device.type == "cuda" if fused is None else fused
    found = [_solve(a, b, tolerance, most, fused) for a, b in blocks]
    alpha = torch.cat([part[0] for part in found]).view(shape)
    log_z = torch.cat([part[1] for part in found]).view(shape)
    return Alpha(alpha, -log_z, log_z, max((part[2] for part in found), default=0))


def _solve(logp_theta: Tensor, logp_t: Tensor, tolerance: float, most: int, fused: bool) -> tuple[Tensor, Tensor, int]:
    """alpha (N,), log Z (N,) and the passes of the slowest of the rows (N, V)."""
    dtype = torch.float64 if logp_theta.dtype == torch.float64 else torch.float32
    logp_theta, logp_t = logp_theta.to(dtype), logp_t.to(dtype)
    d, support = log_ratio(logp_theta, logp_t)
    zero = torch.zeros(d.shape[:-1], dtype=torch.float64, device=d.device)
    b, done = zero + 0.5, (d == 0).all(-1)
    # in low precision a softmax does not sum to 1; for two nearly equal models that moves the root out of [0, 1]
    scale_theta, scale_t = (zero, zero) if dtype == torch.float64 else (_log_mass(logp_theta), _log_mass(logp_t))
    d = torch.where(support, d - (scale_t - scale_theta).unsqueeze(-1).to(dtype), 0.0)
    # 1. rows without an interior root: some token is forbidden by one model only, and K' >= 0 at b = 0 or <= 0 at b = 1
    if not bool(support.all()):
        truncated = (torch.isfinite(logp_theta) != torch.isfinite(logp_t)).any(-1) & ~done
        logp_theta = logp_theta.masked_fill(~support, -torch.inf)
        at_theta, at_t = (_tilt(logp_theta, d, end).mean for end in (zero, zero + 1))
        stuck_low, stuck_high = truncated & (at_theta >= 0), truncated & (at_t <= 0)
        b = torch.where(stuck_low, 0.0, torch.where(stuck_high, 1.0, b))
        done = done | stuck_low | stuck_high
    # 2. a float32 search, then float64 from where it ended
    iterations = 0
    if dtype == torch.float32:
        b, _, iterations = _balance(logp_theta, d, b, done, max(1e-5, tolerance), True, most, fused)
        logp_theta = logp_theta.double()
        d = torch.where(support, logp_t.double() - logp_theta - (scale_t - scale_theta).unsqueeze(-1), 0.0)
    b, log_z, more = _balance(logp_theta, d, b, done, tolerance, False, most, fused)
    return 1 - b, log_z - scale_theta, iterations + more


def _log_mass(logp: Tensor) -> Tensor:
    """log Σ π (N,) of log-probabilities (N, V), summed in float64."""
    return logp.exp().sum(-1, dtype=torch.float64).log()


def _balance(
    logp_theta: Tensor, d: Tensor, b: Tensor, done: Tensor, goal: float, relative: bool, most: int, fused: bool
) -> tuple[Tensor, Tensor, int]:
    """Halley's method from b (N,) inside a shrinking bracket, until |K'| <= goal (1 + sqrt E d² if relative).

    A row that has converged stays, so its result does not depend on the other rows. Returns b, log Z at b, passes.
    """
    low, high = torch.zeros_like(b), torch.ones_like(b)
    for passes in range(1, most + 1):
        if fused:
            log_z, mean, spread, step = _fused_pass()(logp_theta, d, b)
        else:
            weight, log_z, mean, spread = _tilt(logp_theta, d, b)
        done = done | (mean.abs() <= goal * (1 + relative * spread))
        if bool(done.all()) or passes == most:
            break
        low, high = torch.where(mean < 0, b, low), torch.where(mean < 0, high, b)
        proposed = b - (step if fused else _halley_step(weight, d))
        inside = (proposed > low) & (proposed < high)
        b = torch.where(done, b, torch.where(inside, proposed, (low + high) / 2))
    return b, log_z, passes


def mix(logp_theta: Tensor, logp_t: Tensor, alpha: Tensor | float) -> tuple[Tensor, Tensor]:
    """log q_α (..., V) and log Z(α) (...); a token that either model forbids has probability 0. alpha (...) or a number."""
    _, support = log_ratio(logp_theta, logp_t)
    alpha = torch.as_tensor(alpha, dtype=logp_theta.dtype, device=logp_theta.device)
    alpha = alpha.expand(logp_theta.shape[:-1]).unsqueeze(-1)
    # not log pi_theta + b d: b = 1 - alpha loses a small alpha, which matters for tokens that pi_theta all but forbids
    logits = torch.where(support, alpha * logp_theta + (1 - alpha) * logp_t, -torch.inf)
    log_z = logits.logsumexp(-1)
    return logits - log_z.unsqueeze(-1), log_z


def residual(log_q: Tensor, logp_drafter: Tensor) -> Tensor:
    """norm((q - p)+) (..., V): drawn from after a rejection, it makes the distribution of the output exactly q.

    Where q = p nothing is rejected, and q itself is returned.
    """
    excess = (log_q.exp() - logp_drafter.exp()).clamp(min=0)
    mass = excess.sum(-1, keepdim=True)
    return torch.where(mass > 0, excess / mass.clamp(min=torch.finfo(excess.dtype).tiny), log_q.exp())


def overlap(logp: Tensor, logq: Tensor) -> Tensor:
    """Σ min(p, q) (...): the acceptance rate of tokens drawn from one where the other is the target."""
    return torch.minimum(logp.exp(), logq.exp()).sum(-1)


def truncate(log_q: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Only the top_k most probable tokens, then the fewest whose mass reaches top_p; renormalised, (..., V).

    Tokens that tie with the last one stay too. top_k=1 is the first of the most probable tokens alone.
    """
    if top_k == 1:
        first = torch.zeros_like(log_q, dtype=torch.bool).scatter(-1, log_q.argmax(-1, keepdim=True), True)
        return torch.where(first, 0.0, -torch.inf).to(log_q.dtype)
    if top_k is not None and top_k < log_q.shape[-1]:
        least = log_q.topk(top_k, -1).values[..., -1:]
        log_q = log_q.masked_fill(log_q < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, index = log_q.log_softmax(-1).sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= top_p)
        log_q = log_q.masked_fill(dropped, -torch.inf)
    return log_q.log_softmax(-1)
