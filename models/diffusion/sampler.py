"""Generation by unmasking, a few tokens in each forward pass (Nie et al., LLaDA, 2025, algorithms 4 and 5).

Legend: B batch, L length, R response columns, V vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Generator, Tensor

from models.backbones.llada import LladaModel
from models.functional.errors import UsageError
from models.functional.gumbel import sample_categorical
from models.functional.rows import response_columns
from models.interfaces.decoder import TokenCallback

Remasking = Literal["low_confidence", "random"]


def linear_transfer_counts(tokens: int, steps: int) -> list[int]:
    """How many tokens to reveal at each step: floor(tokens / steps), and one more on the first tokens % steps steps."""
    whole, rest = divmod(tokens, steps)
    return [whole + (step < rest) for step in range(steps)]


def guided_logits(
    model: LladaModel, xt: Tensor, attention_mask: Tensor, response_mask: Tensor, guidance: float
) -> Tensor:
    """Response logits (B, R, V) with classifier-free guidance un + (w + 1)(c - un); `un` sees the prompt masked.

    w = 0 is the conditional model in one forward pass; otherwise two. The mask token itself is never generated.
    """
    columns = response_columns(response_mask)
    conditional = model.lm_head(model.hidden(model.embed(xt), attention_mask)[:, -columns:])
    if guidance != 0:
        hidden_prompt = torch.where(response_mask, xt, model.mask_id)
        unconditional = model.lm_head(model.hidden(model.embed(hidden_prompt), attention_mask)[:, -columns:])
        conditional = unconditional + (guidance + 1) * (conditional - unconditional)
    conditional[..., model.mask_id] = float("-inf")
    return conditional


@torch.no_grad()
def generate_masked_diffusion(
    model: LladaModel,
    rows: dict[str, Tensor],
    generator: Generator,
    *,
    steps: int,
    block_length: int | None = None,
    temperature: float = 1.0,
    remasking: Remasking = "random",
    guidance: float = 0.0,
    on_tokens: TokenCallback | None = None,
) -> Tensor:
    """Responses (B, R) for rows laid out as prompt columns then R response columns.

    Blocks of `block_length` response tokens (all of them by default) are filled left to right, in `steps` forward passes.
    Each of these draws all masked tokens of the block and keeps the scheduled number: the most probable draws
    (`low_confidence`; at temperature 1 this favours a few safe texts) or randomly chosen ones (`random`, ancestral sampling).
    on_tokens: see `Decoder`.
    """
    response_mask, attention_mask = rows["response_mask"], rows["attention_mask"]
    length = response_columns(response_mask)
    block_length = block_length or length
    if length % block_length:
        raise UsageError(f"block_length={block_length} must divide the response length {length}")
    blocks = length // block_length
    if steps % blocks:
        raise UsageError(
            f"forwards={steps} must be a multiple of the {blocks} blocks; type forwards={blocks} or {2 * blocks}"
        )
    if steps > length:
        raise UsageError(f"forwards={steps} exceeds the {length} tokens to fill; type forwards={length} or less")
    if remasking not in ("low_confidence", "random"):
        raise UsageError(f"remasking={remasking} is not known; type low_confidence or random")

    xt = torch.where(response_mask, model.mask_id, rows["input_ids"])
    for block in range(blocks):
        start, end = block * block_length, (block + 1) * block_length
        for count in linear_transfer_counts(block_length, steps // blocks):
            # 1. a draw for every response position
            logits = guided_logits(model, xt, attention_mask, response_mask, guidance)
            drawn = sample_categorical(logits, temperature, generator)  # (B, R)
            # 2. the confidence of each; only masked positions of this block compete
            if remasking == "low_confidence":
                confidence = torch.softmax(logits.double(), -1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            else:
                confidence = torch.rand(drawn.shape, generator=generator, device=drawn.device, dtype=torch.float64)
            response = xt[:, -length:]
            competing = response == model.mask_id
            competing[:, :start] = False
            competing[:, end:] = False
            confidence = confidence.masked_fill(~competing, -1.0)
            # 3. keep the scheduled number
            kept = torch.zeros_like(competing).scatter(1, confidence.topk(count, dim=-1).indices, True)
            xt[:, -length:] = torch.where(kept, drawn, response)
            if on_tokens is not None:
                on_tokens(xt[:, -length:].clone())
    return xt[:, -length:].clone()


class MaskedDiffusionDecoder:
    """`generate_masked_diffusion` of one model with its options fixed, as a `Decoder`."""

    method = "teacher"
    refines = True

    def __init__(
        self,
        model: LladaModel,
        forwards: int,
        *,
        temperature: float = 1.0,
        remasking: Remasking = "random",
        block_length: int | None = None,
        guidance: float = 0.0,
    ) -> None:
        self.model, self.steps = model, forwards
        self.forwards = forwards * (1 if guidance == 0 else 2)
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "remasking": remasking,
            "block_length": block_length,
            "guidance": guidance,
        }
        self.name = f"teacher, {'greedy' if temperature == 0 else 'sampled'}"

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        return generate_masked_diffusion(
            self.model, rows, generator, steps=self.steps, on_tokens=on_tokens, **self.options
        )
