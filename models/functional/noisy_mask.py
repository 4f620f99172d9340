r"""The noisy-mask flow: masks carry noise, and a flow map carries each noise to a text of its own.

From one fixed all-mask response a single forward pass can only factorise over positions. Here a masked position starts at
z_0 = m + σ ε, ε ~ N(0, I), and moves on the line z_s = (1 - s) z_0 + s E_x to the embedding of its token. Every
position reads the noise of all the others: a deterministic map of it can give texts that are coherent *and* diverse.

With D_s(z) = P(x_l | z, c), the flow's velocity is (D_s E - z) / (1 - s), and its solution from s to t is

.. math:: X_{s,t}(z) = \frac{(1-t) z + (t-s) \psi_{s,t} E}{1-s}, \qquad
          \psi_{s,t} = \int_s^t w(u) D_u(z_u) du, \quad w(u) = \frac{(1-s)(1-t)}{(t-s)(1-u)^2},

with ψ on the simplex: the average recovery distribution over the interval. ψ_{s,s} = D_s, and ψ_{s,1} is the endpoint.
Sources: Boffi, Albergo, Vanden-Eijnden, How to build a consistency model (2025) for self-distilled flow maps; Geng et al.,
Mean Flows (2025). Both identities are re-derived in tests/models/functional/test_noisy_mask.py on an exact denoiser.

Times are **data times**: s <= t, 0 = noisy mask, 1 = clean text (noise time is 1 - s).
Legend: B batch, L length, D width, V vocabulary. Times (...) broadcast over the last dimension of points and distributions.
"""

import math

import torch
from torch import Generator, Tensor

from models.functional.divergence import by_positions, kl_divergence
from models.functional.errors import UsageError


def noisy_mask(mask_embedding: Tensor, sigma: float, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """z_0 = m + σ ε for positions of `shape`: (D,) -> (*shape, D). σ is in the units of the embedding's coordinates."""
    width, device = mask_embedding.shape[-1], mask_embedding.device
    eps = torch.randn(*shape, width, generator=generator, device=device)
    return mask_embedding + sigma * eps.to(mask_embedding.dtype)


def line_point(z0: Tensor, clean: Tensor, s: Tensor) -> Tensor:
    """z_s = (1 - s) z_0 + s E_x. z0, clean (..., D); s (...)."""
    s = s.unsqueeze(-1)
    return (1 - s) * z0 + s * clean


def wiener_gain(s: Tensor, sigma: float, spread: float) -> Tensor:
    """c_s = v² s / (v² s² + (1 - s)² σ²): no multiple of z_s - m is nearer to E_x - m than c_s (z_s - m) in mean square.

    spread v: root mean square of E_x - m over tokens and coordinates, in the unit of σ. c_0 = 0: the mask; c_1 = 1: the token.
    A network that reads z_s without its time cannot know this factor. s (...) in [0, 1].
    """
    return s / (s.square() + ((1 - s) * sigma / spread).square())


def token_evidence(z: Tensor, mask_embedding: Tensor, embedding: Tensor, s: Tensor, sigma: float) -> Tensor:
    """log N(z_s; (1 - s) m + s E_x, (1 - s)² σ²) for every token x, up to a constant: the likelihood of each token.

    z (..., D), embedding (V, D), s (...) < 1, σ in the units of the embedding's coordinates -> (..., V) nats; 0 at s = 0.
    An exact D_s needs these and a prior of texts.
    """
    s = s.unsqueeze(-1)
    signal = (z - (1 - s) * mask_embedding) @ embedding.T - s * embedding.square().sum(-1) / 2
    return s * signal / ((1 - s) * sigma).square()


def certain_mean(evidence: Tensor, otherwise: Tensor, embedding: Tensor) -> Tensor:
    """(1 - c) o + c Σ_x p_x E_x, p = softmax(evidence), c = 1 - H(p) / log V: o without evidence, E_x where x is sure.

    evidence (..., V) of `token_evidence`, otherwise o (D,) or (..., D), embedding (V, D) -> (..., D). A network that reads the
    linear estimate of `wiener_gain` has to find the nearest of V tokens itself; this one has done it, with equal priors.
    """
    log_p, most = torch.log_softmax(evidence, dim=-1), math.log(len(embedding))
    certainty = kl_divergence(log_p, log_p.new_tensor(-most)).unsqueeze(-1) / most  # of p from equal probabilities
    return otherwise + certainty * (log_p.exp() @ embedding - otherwise)


def velocity(z: Tensor, expected: Tensor, s: Tensor) -> Tensor:
    """dz/ds = (D_s E - z) / (1 - s) with expected = D_s E. z, expected (..., D); s (...) < 1."""
    return (expected - z) / (1 - s).unsqueeze(-1)


def flow_map(z: Tensor, expected: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """X_{s,t}(z) = [(1 - t) z + (t - s) ψ_{s,t} E] / (1 - s) with expected = ψ_{s,t} E. X_{s,s} is the identity."""
    s, t = s.unsqueeze(-1), t.unsqueeze(-1)
    return ((1 - t) * z + (t - s) * expected) / (1 - s)


def split_weight(s: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """a = (u - s)(1 - t) / ((t - s)(1 - u)), the first part's weight when [s, t] is cut at u; a = 0 where t = 1.

    The 0/0 of an empty interval is set to 1, where both parts are the same.
    """
    length = (t - s) * (1 - u)
    return torch.where(length > 0, (u - s) * (1 - t) / length.clamp(min=torch.finfo(s.dtype).tiny), 1.0)


def psd_target(psi_su: Tensor, psi_ut: Tensor, s: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """ψ_{s,t} = a ψ_{s,u}(z) + (1 - a) ψ_{u,t}(X_{s,u}(z)): progressive self-distillation, s <= u <= t.

    psi_su, psi_ut (..., V) distributions; times (...). It is X_{u,t} ∘ X_{s,u} = X_{s,t} solved for ψ; on the simplex.
    """
    a = split_weight(s, u, t).unsqueeze(-1)
    return (a * psi_su + (1 - a) * psi_ut).detach()


def second_order_step(d_s: Tensor, d_r: Tensor, r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """ψ_{s,t} from D at two times of the flow, r < s < t: the Euler step takes D_s, this one extrapolates D as well.

    With D_u = D_s + (u - s)(D_s - D_r)/(s - r) the integral of ψ is D_s + c (D_s - D_r),
    c = (1 - s) [(t - s) + (1 - t) log((1 - t)/(1 - s))] / ((t - s)(s - r)).
    d_s, d_r (..., V) distributions; times (...). Where the line leaves the simplex, negative probabilities are set to 0 and
    the others are scaled to a sum of 1. An Adams-Bashforth method for the exponential integrator that `flow_map`
    is (Zhang & Chen, Fast sampling of diffusion models with exponential integrator, 2023; Lu et al., DPM-Solver++, 2022).
    """
    rest = torch.where(t < 1, (1 - t) * torch.log1p(-((t - s) / (1 - s)).clamp(max=1 - torch.finfo(t.dtype).eps)), 0.0)
    c = (1 - s) * ((t - s) + rest) / ((t - s) * (s - r))
    psi = (d_s + c.unsqueeze(-1) * (d_s - d_r)).clamp(min=0)
    return psi / psi.sum(-1, keepdim=True)


def recovery_ratio(psi: Tensor, logit_derivative: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """ρ = 1 - κ δ, δ = df - Σ ψ df, κ = (1 - s)(t - s) / (1 - t): at the exact flow map ρ = D_s / ψ_{s,t}.

    logit_derivative (..., V) is df/ds of the logits f of ψ along ((D_s E - z)/(1 - s), ds = 1, dt = 0); t < 1.
    """
    delta = logit_derivative - (psi * logit_derivative).sum(-1, keepdim=True)
    kappa = (1 - s) * (t - s) / (1 - t)
    return 1 - kappa.unsqueeze(-1) * delta


def noisy_meanflow_target(
    log_d: Tensor, logits: Tensor, logit_derivative: Tensor, s: Tensor, t: Tensor, rho_min: float = 0.05
) -> Tensor:
    """The corrected mean-flow identity as a distribution: softmax(log D_s - log max(ρ, ρ_min)), (..., V), t < 1.

    From d/ds X_{s,t}(z_s) = 0 follows ψ = D_s + κ dψ/ds, hence D_s = ψ ρ. Dividing keeps the target on the simplex, where
    the sum D_s + κ dψ/ds would leave it. No token can rise above D_s / ρ_min: choose ρ_min below the D_s of tokens that should
    become probable. Early in training many ρ are <= 0 for wide intervals, so intervals must grow.
    """
    psi = torch.softmax(logits.detach(), dim=-1)
    rho = recovery_ratio(psi, logit_derivative, s, t)
    return torch.softmax(log_d - rho.clamp(min=rho_min).log(), dim=-1).detach()


def warp_time(q: Tensor, center: float = 0.5) -> Tensor:
    """s(q) = k q / (k q + 1 - q), k = center / (1 - center): a uniform q spends half of its mass below `center`.

    Choose it where tokens become decodable. Changing the centre is the same as changing σ, up to the scale of z.
    """
    if not 0 < center < 1:
        raise UsageError(f"module.time_center={center} must lie between 0 and 1; 0.5 leaves times as they are")
    if center == 0.5:
        return q
    k = center / (1 - center)
    return k * q / (k * q + (1 - q))  # written so that s(1) is 1 exactly: past it, weights of ψ would be negative


def distribution_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target || softmax(logits)) per position, nats: (..., V) distribution, (..., V) logits -> (...)."""

    def divergence(target: Tensor, logits: Tensor) -> Tensor:
        return (torch.xlogy(target, target) - target * torch.log_softmax(logits, dim=-1)).sum(-1)

    return by_positions(divergence, target, logits)


def gap_weight(target: Tensor, logits: Tensor, floor: float = 1e-6) -> Tensor:
    """sg(||ψ - target||² + floor)^(-1/2): easy and hard positions get similar weight. Log the raw loss too."""
    difference = torch.softmax(logits.detach(), dim=-1) - target
    return (difference.square().sum(-1) + floor).rsqrt()
