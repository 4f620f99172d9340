r"""NLL of a plan and KL of two distributions over plans, slot by slot.

.. math:: -\log p(z \mid u) = -\sum_s \log p(z_s \mid z_{<s}, u) \qquad
          \mathrm{KL}(q \| p) = \sum_s \mathrm{KL}\big(q(z_s \mid z_{<s}) \,\|\, p(z_s \mid z_{<s})\big)

both over the open slots, those before the end of their sequence. Nats throughout.
Legend: B batch, S slots, W choices of a slot (impossible ones have a very small log-probability).
"""

from torch import Tensor

from models.functional.divergence import kl_divergence


def plan_nll(log_p: Tensor, choices: Tensor, open_slots: Tensor) -> Tensor:
    """-log p of the choices (B, S) under log_p (B, S, W), 0 at slots that are not open (B, S) bool; (B, S)."""
    chosen = log_p.gather(-1, choices.unsqueeze(-1)).squeeze(-1)
    return (-chosen).masked_fill(~open_slots, 0.0)


def slot_kl(log_q: Tensor, log_p: Tensor, open_slots: Tensor) -> Tensor:
    """KL of each slot's two distributions given the same earlier choices, (B, S); an unbiased draw of the sequences' KL."""
    return kl_divergence(log_q, log_p).masked_fill(~open_slots, 0.0)


def free_bits(kl: Tensor, floor: float) -> Tensor:
    """max(kl, floor) of each slot's mean KL (S,), nats: below the floor there is no gradient (Kingma et al., 1606.04934)."""
    return kl.clamp(min=floor)
