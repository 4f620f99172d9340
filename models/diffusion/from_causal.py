"""Training a causal LM to fill masks: complementary views of each response, and next-token prediction beside them.

Complementary masks: Fast-dLLM v2 (2509.26328). Next-token prediction on the clean text, and blocks that grow: NBDiff
(2512.06776). Legend: B batch, L columns.
"""

from typing import Any

import torch
from torch import Generator, Tensor

from models.backbones.bidirectional import any_order_nll, fill_nll
from models.backbones.masked_from_causal import MaskedFromCausal
from models.functional.errors import UsageError, require_share
from models.functional.masked_diffusion import mask_tokens
from models.functional.next_token import bidirectional_text
from models.functional.uniform import uniform
from models.interfaces.objective import Terms, TextObjective


class CausalToMasked(TextObjective):
    """Mean cross entropy of the masked response tokens, each of them masked in exactly one of two views of its row.

    A row is masked with probability t ~ U(t_min, 1) a token, or with `all_masked_share` wholly; the second view masks the
    other tokens. End padding is trained, because a model that fills masks has to write it.
    next_token: (at the start, at the end) weight of the causal model's own loss on the clean response, which keeps what it
        knows; linear over the training, [0, 0] is none.
    growth: block lengths in equal parts of the first `growth_share` of the steps, before the whole response is one block. A
        row then has one block masked, with the blocks before it clean and those after it out of sight.
    """

    likelihood = "bound"
    generation = "masked"
    attention = "bidirectional"

    def __init__(
        self,
        *,
        t_min: float = 0.1,
        all_masked_share: float = 0.25,
        complementary: bool = True,
        next_token: tuple[float, float] = (0.0, 0.0),
        growth: tuple[int, ...] = (1, 4, 16),
        growth_share: float = 0.0,
    ) -> None:
        shares = {"t_min": t_min, "all_masked_share": all_masked_share, "growth_share": growth_share}
        require_share(**{f"module__objective__{name}": value for name, value in shares.items()})
        if not growth or min(growth) < 1:
            raise UsageError(f"module.objective.growth={list(growth)} must be block lengths of at least 1")
        self.t_min, self.all_masked_share, self.complementary = t_min, all_masked_share, complementary
        self.next_token, self.growth, self.growth_share = tuple(next_token), tuple(growth), growth_share
        self.share = 0.0

    def attach(self, model: MaskedFromCausal) -> None:
        if not isinstance(model, MaskedFromCausal):
            raise UsageError("module/objective=causal_to_masked needs model=from_causal; type both")

    def before_step(self, share: float) -> None:
        self.share = share

    def block_length(self) -> int | None:
        """Of this step; None: the whole response."""
        if self.share >= self.growth_share:
            return None
        return self.growth[int(self.share / self.growth_share * len(self.growth))]

    def __call__(self, model: MaskedFromCausal, batch: dict[str, Tensor], generator: Generator) -> Terms:
        x0, attention_mask, maskable = bidirectional_text(batch)
        response_mask = batch["response_mask"]
        # 1. the block of each row that is masked; later ones are out of sight
        block_length = self.block_length()
        if block_length is not None:
            maskable = one_block(maskable, block_length, generator)
        # 2. complementary views
        masked = self._mask(maskable, generator)
        views = [masked, maskable & ~masked] if self.complementary else [masked]
        nll = torch.zeros(x0.shape, device=x0.device)
        model.block_length = block_length
        stacked, rows = torch.cat(views), torch.arange(len(x0), device=x0.device).repeat(len(views))
        used = stacked.any(-1)  # a row that is masked wholly has no second view
        stacked, rows = stacked[used], rows[used]
        xt = torch.where(stacked, model.mask_id, x0[rows])
        found = fill_nll(model, xt, x0[rows], stacked, attention_mask[rows], response_mask[rows])
        nll = nll.index_add(0, rows, found.to(nll.dtype))
        tokens = int(stacked.sum())
        loss = nll.sum() / max(1, tokens)
        raw: dict[str, Any] = {"masked": loss.detach()}
        # 3. next-token prediction on the clean response
        weight = self.next_token[0] + self.share * (self.next_token[1] - self.next_token[0])
        if weight:
            own = self.causal_nll(model, batch)
            raw["next_token"] = own.detach()
            loss = loss + weight * own
        model.block_length = None
        return Terms(loss, raw, tokens, nll)

    def causal_nll(self, model: MaskedFromCausal, batch: dict[str, Tensor]) -> Tensor:
        """Mean NLL of the clean response under the causal model, in nats a token."""
        x0, attention_mask, response = bidirectional_text(batch)
        model.block_length = 1
        nll = fill_nll(model, x0, x0, response, attention_mask, response)
        model.block_length = None
        return nll.sum() / response.sum()

    def text_nll(self, model: MaskedFromCausal, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        return any_order_nll(model, batch, generator)

    def _mask(self, maskable: Tensor, generator: Generator) -> Tensor:
        share, which = uniform(2, len(maskable), generator=generator)
        t = torch.where(which < self.all_masked_share, 1.0, self.t_min + (1 - self.t_min) * share)
        return mask_tokens(maskable.long(), maskable, t, 0, generator)[1]


def one_block(response: Tensor, block_length: int, generator: Generator) -> Tensor:
    """(B, L) bool: one block of `block_length` positions of each row's response, every block equally likely."""
    size = response.sum(-1)
    blocks = -(-size // block_length)
    chosen = (uniform(len(response), generator=generator) * blocks).long()
    number = response.long().cumsum(-1) - 1
    return response & (number // block_length == chosen.unsqueeze(-1))
