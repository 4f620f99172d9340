"""The likelihood of a response under a masked diffusion model: a Monte Carlo bound, and whether greedy filling gives it.

As LLaDA is evaluated (Nie et al., 2502.09992, algorithm 3).
Legend: N draws, L columns, R response columns, V vocabulary.
"""

import torch
from torch import Generator, Tensor

from models.backbones.llada import LladaModel
from models.diffusion.sampler import generate_masked_diffusion, response_logits
from models.functional.masked_lm import any_order_weight, hide_exactly, stratified_count
from models.functional.nll import chosen_nll
from models.functional.rows import response_columns


@torch.no_grad()
def response_nll_draws(
    model: LladaModel,
    row: dict[str, Tensor],
    generator: Generator,
    *,
    samples: int,
    batch_size: int = 32,
    guidance: float = 0.0,
) -> Tensor:
    r"""Draws (N,), N = samples, whose mean is a bound on -log p(response | prompt) of one row (1, L), in nats.

    .. math:: -\log p(x) \le E_{l, M}\Big[\frac{R}{l} \sum_{i \in M} -\log p(x_i \mid x_{\setminus M})\Big]

    l ~ U{1..R} tokens are hidden, M is a uniform choice of l positions. The k-th draw takes l from the k-th of N even parts
    of 1..R, which lowers the variance and keeps the mean. guidance: see `response_logits`. generator: on the CPU; the draws
    do not depend on batch_size, the number of texts that a forward pass reads.
    """
    columns = response_columns(row["response_mask"])
    # 1. how many tokens each draw hides, and which
    every = torch.ones(samples, columns, dtype=torch.bool)
    count = stratified_count(every.sum(-1), torch.arange(samples), samples, generator)
    hidden, weight = hide_exactly(every, count, generator), any_order_weight(every, count)
    # 2. their weighted cross entropy
    draws = []
    for own, weights in zip(hidden.split(batch_size), weight.split(batch_size), strict=True):
        rows = {name: column.expand(len(own), -1) for name, column in row.items()}
        own, xt = own.to(rows["input_ids"].device), rows["input_ids"].clone()
        response = xt[:, -columns:].clone()
        xt[:, -columns:] = torch.where(own, model.mask_id, response)
        nll = chosen_nll(response_logits(model, rows, guidance)(xt, 0, columns)[own], response, own)
        draws.append(nll.sum(-1).double().cpu() * weights)
    return torch.cat(draws)


def fills_greedily(model: LladaModel, row: dict[str, Tensor], guidance: float = 0.0) -> bool:
    """Whether the response of one row (1, L) is what the model fills in, the most certain token first, one a forward pass."""
    response = row["input_ids"][row["response_mask"]]
    unused = Generator(device=response.device)
    filled = generate_masked_diffusion(
        model, row, unused, steps=len(response), temperature=0.0, remasking="low_confidence", guidance=guidance
    )
    return torch.equal(filled[0], response)
