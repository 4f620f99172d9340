"""Training a causal LM to fill masks: complementary views of each response, and next-token prediction beside them.

Complementary masks: Fast-dLLM v2 (2509.26328). Next-token prediction on the clean text, and blocks that grow: NBDiff
(2512.06776). Legend: B batch, L columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.backbones.bidirectional import any_order_nll, fill_nll
from models.backbones.masked_from_causal import MaskedFromCausal
from models.functional.errors import UsageError, require_at_least, require_share
from models.functional.masked_diffusion import mask_tokens
from models.functional.next_token import bidirectional_text
from models.functional.nll import chosen_nll
from models.functional.rows import response_columns
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
    likelihood_passes: forward passes that a draw of the any-order bound takes for a batch; 0 leaves the bound out.
    """

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
        likelihood_passes: int = 4,
    ) -> None:
        shares = {"t_min": t_min, "all_masked_share": all_masked_share, "growth_share": growth_share}
        require_share(**{f"module__objective__{name}": value for name, value in shares.items()})
        if not growth or min(growth) < 1:
            raise UsageError(f"module.objective.growth={list(growth)} must be block lengths of at least 1")
        require_at_least(0, module__objective__likelihood_passes=likelihood_passes)
        self.likelihood_passes = likelihood_passes
        self.likelihood = "bound" if likelihood_passes else None
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
        views = torch.stack([masked, maskable & ~masked] if self.complementary else [masked])
        model.block_length = block_length
        nll = views_nll(model, x0, views, attention_mask, response_mask)
        tokens = int(views.sum())
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
        return any_order_nll(model, batch, generator, self.likelihood_passes)

    def _mask(self, maskable: Tensor, generator: Generator) -> Tensor:
        share, which = uniform(2, len(maskable), generator=generator)
        t = torch.where(which < self.all_masked_share, 1.0, self.t_min + (1 - self.t_min) * share)
        return mask_tokens(maskable.long(), maskable, t, 0, generator)[1]


def views_nll(
    model: MaskedFromCausal, x0: Tensor, views: Tensor, attention_mask: Tensor, response_mask: Tensor
) -> Tensor:
    """-log p of each token where a view masks it, given what that view shows, in nats; 0 where none does: (B, L).

    views (1 or 2, B, L) bool: masks of each row, with no position in two of them. Where both mask something, the row's prompt
    is read once for the two. The number of forward passes does not follow the draws, as sharded weights need it.
    """
    drawn = views.any(-1)
    # 1. rows with one view
    rows = _at_least_one(drawn.sum(0) == 1)
    masked, clean = views[:, rows].any(0), x0[rows]
    xt = torch.where(masked, model.mask_id, clean)
    found = fill_nll(model, xt, clean, masked, attention_mask[rows], response_mask[rows])
    nll = found.new_zeros(x0.shape).index_copy(0, rows, found)
    if len(views) == 1:
        return nll
    # 2. rows with two
    rows, size = _at_least_one(drawn.all(0)), response_columns(response_mask)
    masked, clean = views[:, rows], x0[rows].expand(2, -1, -1)
    xt = torch.where(masked, model.mask_id, clean)
    states = model.response_versions(xt, attention_mask[rows], response_mask[rows])
    chosen = masked[..., -size:]
    both = chosen_nll(model.lm_head(states[chosen]), clean[..., -size:], chosen).sum(0)
    return nll.index_copy(0, rows, F.pad(both, (x0.shape[1] - size, 0)))


def _at_least_one(rows: Tensor) -> Tensor:
    """Where rows (B,) bool is true; the first row where it never is: what it gives is written over, or 0."""
    found = rows.nonzero()[:, 0]
    return found if len(found) else torch.zeros(1, dtype=torch.long, device=rows.device)


def one_block(response: Tensor, block_length: int, generator: Generator) -> Tensor:
    """(B, L) bool: one block of `block_length` positions of each row's response, every block equally likely."""
    size = response.sum(-1)
    blocks = -(-size // block_length)
    chosen = (uniform(len(response), generator=generator) * blocks).long()
    number = response.long().cumsum(-1) - 1
    return response & (number // block_length == chosen.unsqueeze(-1))
