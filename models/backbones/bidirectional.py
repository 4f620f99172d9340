"""Models that fill masks: the check that a model is one, and the likelihood of texts under it.

Legend: B batch, L length.
"""

import torch
from torch import Generator, Tensor, nn

from models.backbones.llada import LladaModel
from models.functional.errors import UsageError
from models.functional.masked_lm import any_order_weight, hide_exactly, stratified_count
from models.functional.next_token import bidirectional_text
from models.functional.nll import chosen_nll


def require_bidirectional(model: nn.Module, objective: str) -> None:
    """Raise UsageError for a model that is not bidirectional."""
    if not hasattr(model, "embed"):
        raise UsageError(f"module/objective={objective} needs a bidirectional model; type model=small (made to fit)")
    if is_block_causal(model):
        raise UsageError(
            f"module/objective={objective} needs a model whose blocks see each other, and this one was trained by block "
            "diffusion; type module/objective=block_diffusion"
        )


def is_block_causal(model: object) -> bool:
    """Whether a model was trained by block diffusion: a block sees nothing that comes after it."""
    return isinstance(model, LladaModel) and model.config.block_causal


def fill_nll(
    model: nn.Module,
    xt: Tensor,
    x0: Tensor,
    chosen: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor | None = None,
) -> Tensor:
    """-log p(x0_l | xt) in nats at the chosen positions, 0 elsewhere, (B, L); logits are computed for those alone.

    response_mask (B, L): of rows with prompts, for the networks whose prompt does not see the response.
    """
    states = model.hidden(model.embed(xt), attention_mask, response_mask=response_mask)
    return chosen_nll(model.lm_head(states[chosen]), x0, chosen)


def any_order_nll(model: nn.Module, batch: dict[str, Tensor], generator: Generator, most: int = 16) -> Tensor:
    """Bound on the NLL of texts filled in random order, by position: (B, L) nats, see `any_order_weight`.

    One forward pass for each number of hidden positions, at most `most` numbers spread evenly over 1..R.
    Unbiased: its mean over draws is the bound.
    """
    x0, attention_mask, maskable = bidirectional_text(batch)
    passes = min(most, int(maskable.sum(-1).max()))
    total = torch.zeros(x0.shape, device=x0.device)
    for k in range(passes):
        count = stratified_count(maskable.sum(-1), k, passes, generator)
        hidden = hide_exactly(maskable, count, generator)
        xt = torch.where(hidden, model.mask_id, x0)
        nll = fill_nll(model, xt, x0, hidden, attention_mask, batch.get("response_mask"))
        total = total + nll * any_order_weight(maskable, count).unsqueeze(-1)
    return total / max(1, passes)
