"""Masked language modelling (BERT): a few tokens hidden, all others seen. Texts are filled in random order."""

import torch
from torch import Generator, Tensor, nn

from models.backbones.causal_lm import require_bidirectional
from models.functional.errors import UsageError
from models.functional.masked_lm import any_order_weight, bert_corrupt, hide_exactly, stratified_count
from models.functional.next_token import whole_text
from models.functional.nll import chosen_nll
from models.interfaces.objective import ObjectiveOutput, TextObjective


class MaskedLM(TextObjective):
    """Mean cross entropy of the chosen tokens; prompts stay clean.

    rate: share of tokens that are chosen; of these 80 % are masked, 10 % random, 10 % left as they are.
    """

    likelihood = "bound"
    generation = "masked"

    def __init__(self, rate: float = 0.15) -> None:
        if not 0 < rate <= 1:
            raise UsageError(f"module.objective.rate={rate} must lie above 0 and at most at 1")
        self.rate = rate

    def attach(self, model: nn.Module) -> None:
        require_bidirectional(model, "masked_lm")

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> ObjectiveOutput:
        x0, attention_mask, maskable = whole_text(batch)
        xt, chosen = bert_corrupt(x0, maskable, model.mask_id, len(model.embedding), generator, self.rate)
        nll = fill_nll(model, xt, x0, chosen, attention_mask)
        return ObjectiveOutput(nll.sum(), int(chosen.sum()), nll)

    def text_nll(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        return any_order_nll(model, batch, generator)


def fill_nll(model: nn.Module, xt: Tensor, x0: Tensor, chosen: Tensor, attention_mask: Tensor) -> Tensor:
    """-log p(x0_l | xt) in nats at the chosen positions, 0 elsewhere, (B, L); only those meet the output layer."""
    return chosen_nll(model.lm_head(model.hidden(model.embed(xt), attention_mask)[chosen]), x0, chosen)


def any_order_nll(model: nn.Module, batch: dict[str, Tensor], generator: Generator, most: int = 16) -> Tensor:
    """Bound on the NLL of texts filled in random order, by position: (B, L) nats, see `any_order_weight`.

    A forward with random hidden positions for every number of them, at most `most` numbers spread evenly over 1..R.
    Unbiased: its mean over draws is the bound.
    """
    x0, attention_mask, maskable = whole_text(batch)
    forwards = min(most, int(maskable.sum(-1).max()))
    total = torch.zeros(x0.shape, device=x0.device)
    for k in range(forwards):
        count = stratified_count(maskable.sum(-1), k, forwards, generator)
        hidden = hide_exactly(maskable, count, generator)
        nll = fill_nll(model, torch.where(hidden, model.mask_id, x0), x0, hidden, attention_mask)
        total = total + nll * any_order_weight(maskable, count).unsqueeze(-1)
    return total / max(1, forwards)
