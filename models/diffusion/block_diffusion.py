"""Block diffusion (Arriola et al., BD3-LM, 2503.09573): masked diffusion of one block after the other.

Legend: B batch, L columns, M masked tokens, D width.
"""

import torch
from torch import Generator, Tensor, nn

from models.backbones.llada import LladaModel
from models.functional.attention import positions_from_mask
from models.functional.block_diffusion import (
    before_last_block,
    block_attention,
    block_numbers,
    block_sizes,
    hide_in_blocks,
    of_own_block,
)
from models.functional.errors import UsageError
from models.functional.masked_diffusion import (
    antithetic_times,
    mask_probability,
    mask_tokens,
    masked_diffusion_nll,
    require_least_probability,
)
from models.functional.masked_lm import stratified_count
from models.functional.next_token import bidirectional_text
from models.functional.nll import chosen_nll
from models.functional.uniform import uniform
from models.interfaces.objective import Likelihood, Terms, TextObjective

MOST_PASSES = 16  # of a bound


class BlockDiffusion(TextObjective):
    """Cross entropy / p of the masked tokens, with a time t of its own for every block; divided by the response tokens.

    A block is predicted from its own masked copy and the clean text before it; the prompt is clean text before the first
    block. All blocks of a row are scored in one forward pass, see `masked_states`.
    block_length: tokens of a block; None: the whole response is one. With 1 the model is autoregressive: every token is masked,
    and the loss is its exact NLL.
    """

    likelihood: Likelihood = "bound"
    generation = "masked"
    attention = "bidirectional"

    def __init__(self, block_length: int | None = 4, *, eps: float = 1e-3, antithetic: bool = True) -> None:
        if block_length is not None and block_length < 1:
            raise UsageError(
                f"module.objective.block_length={block_length} must be at least 1, or null for the whole response"
            )
        require_least_probability(eps)
        self.block_length, self.eps, self.antithetic = block_length, eps, antithetic
        if block_length == 1:
            self.likelihood = "exact"

    def attach(self, model: nn.Module) -> None:
        if not isinstance(model, LladaModel):
            raise UsageError("module/objective=block_diffusion needs a bidirectional body of LLaDA; type model=small")
        model.config.block_causal, model.config.block_length = True, self.block_length

    def loss_is_nll(self, batch: dict[str, Tensor]) -> bool:
        return True

    def expected_predictions(self, batch: dict[str, Tensor]) -> float:
        share = 1.0 if self.block_length == 1 else mask_probability(0.5, self.eps)
        return share * int(bidirectional_text(batch)[2].sum())

    def __call__(self, model: LladaModel, batch: dict[str, Tensor], generator: Generator) -> Terms:
        x0, seen, response = bidirectional_text(batch)
        block = block_numbers(response, self.block_length)
        # 1. a time for each block, and its mask probability
        rows, blocks = len(x0), max(1, int(block.max()))
        if self.block_length == 1:
            t = torch.ones(rows, blocks, device=x0.device)
        elif self.antithetic:
            t = antithetic_times(rows * blocks, generator, x0.device).view(rows, blocks)
        else:
            t = uniform(rows, blocks, generator=generator)
        p = of_own_block(mask_probability(t, self.eps), block)
        # 2. the masked copy
        xt, masked = mask_tokens(x0, response, p, model.mask_id, generator)
        # 3. logits of the masked positions
        masked_logits = model.lm_head(masked_states(model, xt, x0, masked, block, seen))
        # 4. their cross entropy, weighted by 1 / p
        nll = masked_diffusion_nll(masked_logits, x0, masked, p)
        return Terms.over_tokens(nll.sum(), int(response.sum()), nll, predictions=masked.sum())

    def text_nll(self, model: LladaModel, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        """The bound of a model that fills each block in random order: an unbiased draw of it, see `any_order_weight`.

        One forward pass for each number of hidden tokens in a block, at most `MOST_PASSES` numbers.
        """
        x0, seen, response = bidirectional_text(batch)
        block = block_numbers(response, self.block_length)
        sizes = block_sizes(block)
        passes = min(MOST_PASSES, int(sizes.max()))
        total = torch.zeros(x0.shape, device=x0.device)
        for k in range(passes):
            count = stratified_count(sizes, k, passes, generator)
            hidden = hide_in_blocks(block, count, generator)
            xt = torch.where(hidden, model.mask_id, x0)
            nll = chosen_nll(model.lm_head(masked_states(model, xt, x0, hidden, block, seen)), x0, hidden)
            total = total + nll * of_own_block(sizes / count, block)
        return total / max(1, passes)


def masked_states(model: LladaModel, xt: Tensor, x0: Tensor, masked: Tensor, block: Tensor, seen: Tensor) -> Tensor:
    """What predicts the masked tokens of all blocks, (M, D) in row-major order, in one forward pass over two copies.

    The clean text x0 (B, L) up to the last block stands beside the noised response of xt (B, L), at the same positions; who
    sees whom: `block_attention`. masked (B, L) bool; block (B, L): see `block_numbers`; seen (B, L) bool is False on padding.
    """
    clean = slice(0, before_last_block(block))
    noised = slice(int((block > 0).any(0).long().argmax()), None)

    def both(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first[:, clean], second[:, noised]], 1)

    is_noised = both(torch.zeros_like(seen), torch.ones_like(seen))
    visible = block_attention(both(block, block), is_noised, both(seen, seen))
    positions = positions_from_mask(seen)
    states = model.states(model.embed(both(x0, xt)), visible, both(positions, positions))
    return states[:, clean.stop :][masked[:, noised]]
