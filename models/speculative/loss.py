r"""Training π_θ toward q*, on texts that π_θ generates.

No gradient flows through q*. With `kl` the loss is KL(q*‖π_θ). With `acceptance` it is the rejection rate of π_θ's drafts,
1 - Σ min(q*, π_θ) = TV(q*, π_θ).
Legend: M positions that count, V vocabulary.
"""

from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.functional.divergence import kl_divergence
from models.functional.errors import require_choice
from models.functional.qstar import overlap
from models.interfaces.objective import Terms, mean_of
from models.speculative.distribution import MixtureDist
from models.speculative.options import QStarLoss

CHUNK_NUMBERS = 2**25  # log-probabilities of a model that are worked on together


def qstar_terms(theta: Tensor, target: Tensor, mixture: MixtureDist, loss: QStarLoss) -> Terms:
    """theta, target (M, V): log-probabilities at the same positions, gradients through theta only.

    raw, means over the positions: alpha, chernoff (nats); kl_theta = KL(q*‖π_θ), kl_target = KL(q*‖π_t), kl_theta_target =
    KL(π_θ‖π_t) and kl_target_theta; entropy of q* (nats); beta_theta and beta_target, the acceptance rates of drafts of
    either model; overlap, that of π_θ's drafts if π_t were the target.
    Beside theta, target and a gradient, memory is that of `CHUNK_NUMBERS` log-probabilities, not of M x V.
    """
    require_choice("module.loss", loss, get_args(QStarLoss))
    terms = partial(_position_terms, mixture=mixture, loss=loss)
    size = max(1, CHUNK_NUMBERS // theta.shape[-1])
    if len(theta) <= size:
        value, raw = terms(theta, target)
    else:
        chunks = zip(theta.split(size), target.split(size), strict=True)
        # the backward pass computes a chunk again, so that nothing of a chunk is kept until then
        found = [checkpoint(terms, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        value = torch.cat([part for part, _ in found])
        raw = {name: torch.cat([part[name] for _, part in found]) for name in found[0][1]}
    return Terms(mean_of(value), {name: mean_of(part.float()) for name, part in raw.items()})


def _position_terms(
    theta: Tensor, target: Tensor, mixture: MixtureDist, loss: QStarLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the figures of each position, (M,) each."""
    fixed = theta.detach()
    dist = mixture(fixed, target)
    q = dist.log_q.exp()
    value = kl_divergence(dist.log_q, theta) if loss == "kl" else 1 - torch.minimum(q, theta.exp()).sum(-1)
    raw = {
        "alpha": dist.alpha,
        "chernoff": dist.chernoff,
        "kl_theta": kl_divergence(dist.log_q, fixed),
        "kl_target": kl_divergence(dist.log_q, target),
        "kl_theta_target": kl_divergence(fixed, target),
        "kl_target_theta": kl_divergence(target, fixed),
        "entropy": -torch.xlogy(q, q).sum(-1),
        "beta_theta": overlap(dist.log_q, fixed),
        "beta_target": overlap(dist.log_q, target),
        "overlap": overlap(fixed, target),
    }
    return value, raw
