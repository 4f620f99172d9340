r"""Drawing π_θ toward q*, on texts that π_θ itself has said.

q* is taken as it stands (no gradient): with `kl` the loss is KL(q*‖π_θ), with `acceptance` it is the share of π_θ's drafts that
is refused, 1 - Σ min(q*, π_θ) = TV(q*, π_θ).
Legend: M places that count, V vocabulary.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from models.functional.divergence import kl_divergence
from models.functional.errors import require_choice
from models.functional.qstar import overlap
from models.interfaces.objective import Terms, mean_of
from models.speculative.distribution import MixtureDist

QStarLoss = Literal["kl", "acceptance"]


def qstar_terms(theta: Tensor, target: Tensor, mixture: MixtureDist, loss: QStarLoss) -> Terms:
    """theta, target (M, V): log-probabilities of the same places, gradients through theta only.

    raw, means over the places: alpha, chernoff (nats); kl_theta = KL(q*‖π_θ), kl_target = KL(q*‖π_t), kl_theta_target =
    KL(π_θ‖π_t) and kl_target_theta; entropy of q* (nats); beta_theta and beta_target, the chances that a token of either
    is kept; overlap, the chance that π_θ's tokens would be kept for π_t.
    """
    require_choice("module.loss", loss, get_args(QStarLoss))
    fixed = theta.detach()
    here = mixture(fixed, target)
    q = here.log_q.exp()
    value = kl_divergence(here.log_q, theta) if loss == "kl" else 1 - torch.minimum(q, theta.exp()).sum(-1)
    raw = {
        "alpha": here.alpha,
        "chernoff": here.chernoff,
        "kl_theta": kl_divergence(here.log_q, fixed),
        "kl_target": kl_divergence(here.log_q, target),
        "kl_theta_target": kl_divergence(fixed, target),
        "kl_target_theta": kl_divergence(target, fixed),
        "entropy": -torch.xlogy(q, q).sum(-1),
        "beta_theta": overlap(here.log_q, fixed),
        "beta_target": overlap(here.log_q, target),
        "overlap": overlap(fixed, target),
    }
    return Terms(mean_of(value), {name: mean_of(part.detach().float()) for name, part in raw.items()})
