r"""The mean-flow identity on logits: learn the average of a masked teacher's logits along its unmasking path.

With u(z, r, t) = 1/(t-r) \int_r^t v(z_s, s) ds the average of v along the path that ends in z at time t,

.. math:: u = v(z, t) - (t - r) \frac{d}{dt} u(z_t, r, t), \qquad r \text{ fixed},

so the right-hand side, held constant, is a regression target for u (Geng et al., Mean Flows for One-step Generative
Modeling, 2025). Times: t = 1 noise, t = 0 data, r <= t.
Legend: B batch, L length, M masked positions of the batch, D width, V vocabulary.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.functional.divergence import by_positions, kl_divergence
from models.functional.errors import UsageError, require_choice
from models.functional.gumbel import sample_categorical
from models.functional.precision import without_autocast

Tangent = Literal["path", "source", "argmax", "sample", "random"]
FlowLoss = Literal["kl", "ce", "mse", "hard"]


def expected_embedding(logits: Tensor, embedding: Tensor) -> Tensor:
    """softmax(logits) E: the mean embedding of the token that the logits expect. (M, V), (V, D) -> (M, D)."""
    with without_autocast(logits):
        return torch.softmax(logits, dim=-1).to(embedding.dtype) @ embedding


def clean_embedding(logits: Tensor, embedding: Tensor, kind: Tangent, generator: Generator | None = None) -> Tensor:
    """The embedding that a masked position of the path comes from, (M, V), (V, D) -> (M, D).

    `path`, `source`: `expected_embedding`. One token's embedding for the others: the most probable one (`argmax`), one drawn
    from softmax(logits) (`sample`), or one drawn uniformly (`random`).
    """
    if kind == "argmax":
        return embedding[logits.argmax(-1)]
    if kind == "sample":
        return embedding[sample_categorical(logits, 1.0, generator)]
    if kind == "random":
        return embedding[torch.randint(len(embedding), logits.shape[:-1], generator=generator, device=logits.device)]
    return expected_embedding(logits, embedding)


def masking_path_tangent(z: Tensor, clean: Tensor, p: Tensor, eps: float, kind: Tangent) -> Tensor:
    r"""dz/dt of the masked rows' embeddings along the masking process.

    `path`: (1-eps)/p(t) (z - softmax(v) E), the mean reverse drift of the masking process; exact as the derivative of a
    path for z on the line z = (1-t) E_x + t m with the exact posterior.
    `sample`, `argmax`, `random`: the same with the embedding of one token, see `clean_embedding`. du/dt is linear in the
    tangent, so `sample` has the mean of `path` over its draws. `argmax` equals `path` where the posterior is certain.
    `random` knows nothing of the text and is a control.
    `source`: softmax(v) E - z, as the method was first written down. It has the opposite sign against t = 1 noise and
    lacks 1/t, so the identity above does not hold along it; kept for comparison.
    z, clean (M, D): clean from `clean_embedding`; p (M,) the mask probability of each position's row.
    """
    require_choice("module.tangent", kind, get_args(Tangent))
    if kind == "source":
        return clean - z
    return ((1 - eps) / p).unsqueeze(-1) * (z - clean)


def meanflow_target(v: Tensor, du_dt: Tensor, r: Tensor, t: Tensor, limit: float | None = None) -> Tensor:
    """u_tgt = sg[v - (t - r) du/dt]. v, du_dt (M, V); r, t (M,).

    The derivative is the student's own, so an error in it enters the student's next target. `limit` bounds the correction
    of each position: its root mean square over the vocabulary, without the part that is constant there (a softmax ignores
    it), is scaled down to at most `limit` logits. None leaves the identity as it is.
    """
    if limit is not None and limit <= 0:
        raise UsageError(f"module.correction_limit={limit} must be above 0; type null for no limit")
    correction = (t - r).unsqueeze(-1) * du_dt
    if limit is not None:
        spread = (correction - correction.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()
        correction = correction * (limit / spread.clamp(min=limit))
    return (v - correction).detach()


def flow_loss(u: Tensor, target: Tensor, kind: FlowLoss, tokens: Tensor | None = None) -> Tensor:
    """Distance of the student's logits u from the target, per masked position: (M, V), (M, V) -> (M,), nats (or logits²).

    `ce` cross entropy against softmax(target); `kl` the same minus the target's entropy (same gradient, zero at the
    optimum); `mse` mean square over the vocabulary of the *logits*; `hard` cross entropy against `tokens` (M,), or
    against argmax(target) without them. Under kl and ce, u is fixed only up to a constant per position.
    """
    if kind == "mse":
        return (u - target).square().mean(-1)
    if kind == "hard":
        tokens = target.argmax(-1) if tokens is None else tokens
        return -F.log_softmax(u, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    if kind == "ce":
        return by_positions(lambda p, q: -(p.log_softmax(-1).exp() * q.log_softmax(-1)).sum(-1), target, u)
    if kind == "kl":
        return by_positions(lambda p, q: kl_divergence(p.log_softmax(-1), q.log_softmax(-1)), target, u)
    raise UsageError(f"module.loss={kind} is not known; type kl, ce, mse or hard")


def adaptive_weight(loss: Tensor, floor: float = 1e-3, power: float = 1.0) -> Tensor:
    """sg[(loss + floor)^(-power)]: easy and hard positions get similar weight. Log the raw loss too."""
    return (loss.detach() + floor).pow(-power)
