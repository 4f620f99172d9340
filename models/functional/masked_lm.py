r"""Masked language modelling (Devlin et al., BERT, 2019), and the likelihood of a model that fills masks one at a time.

Legend: B batch, L length, V vocabulary, R tokens that may be hidden in each row.
"""

import torch
from torch import Generator, Tensor

from models.functional.uniform import uniform


def bert_corrupt(
    x0: Tensor, maskable: Tensor, mask_id: int, vocab_size: int, generator: Generator, rate: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Choose each maskable token with probability `rate`; of the chosen 80 % are masked, 10 % random, 10 % left alone.

    x0 (B, L) ids; maskable (B, L) bool. Returns the corrupted text and the chosen positions, bool; (B, L) each.
    """
    choose, how = uniform(2, *x0.shape, generator=generator)
    anything = torch.randint(vocab_size, x0.shape, generator=generator, device=x0.device)
    chosen = maskable & (choose < rate)
    shown = torch.where(how < 0.8, mask_id, torch.where(how < 0.9, anything, x0))
    return torch.where(chosen, shown, x0), chosen


def hide_exactly(maskable: Tensor, count: Tensor, generator: Generator) -> Tensor:
    """Bool (B, L): `count` (B,) of each row's maskable positions, every choice equally likely."""
    order = uniform(*maskable.shape, generator=generator).masked_fill(~maskable, 2.0)
    rank = order.argsort(-1).argsort(-1)
    return maskable & (rank < count.unsqueeze(-1))


def stratified_count(size: Tensor, k: int | Tensor, parts: int, generator: Generator) -> Tensor:
    """A number from the k-th of `parts` even parts of 1..size for each row, (B,); over all parts together U{1..size}.

    k: the same for all rows, or one for each (B,). With parts = size it is k + 1.
    """
    within = torch.rand(size.shape, generator=generator, device=size.device, dtype=torch.float64)
    return 1 + (size * (k + within) / parts).floor().long().minimum((size - 1).clamp(min=0))


def any_order_weight(maskable: Tensor, count: Tensor) -> Tensor:
    r"""R / count, (B,): the weight of the hidden tokens' cross entropy when `count` of R are hidden.

    With count ~ U{1..R} and a uniform choice of positions, its mean is the NLL averaged over all orders of filling one
    token at a time (Uria et al., 2014; Ou et al., 2024),

    .. math:: E_\sigma[-\log p_\sigma(x)] = E_{n, M}\Big[\frac{R}{n} \sum_{l \in M} -\log p(x_l \mid x_{\setminus M})\Big]
              \ge -\log E_\sigma[p_\sigma(x)],

    an upper bound of the NLL of texts that are filled in random order. LLaDA's bound is the same number.
    """
    return maskable.sum(-1) / count
