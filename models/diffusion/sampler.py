"""Generation by unmasking, a few tokens in each forward pass (Nie et al., LLaDA, 2025, algorithms 4 and 5).

The number of tokens of a pass is scheduled (`generate_masked_diffusion`) or follows the confidence (`generate_by_rule`).

Legend: B batch, L length, R response columns, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Generator, Tensor

from models.backbones.llada import LladaModel
from models.backbones.masked_from_causal import MaskedFromCausal
from models.diffusion.commit_rules import CommitRule
from models.functional.errors import UsageError
from models.functional.gumbel import sample_categorical
from models.functional.rows import response_columns
from models.interfaces.decoder import TokenCallback
from models.interfaces.masked_sampling import Remasking


def linear_transfer_counts(tokens: int, steps: int) -> list[int]:
    """How many tokens to reveal at each step: floor(tokens / steps), and one more on the first tokens % steps steps."""
    whole, rest = divmod(tokens, steps)
    return [whole + (step < rest) for step in range(steps)]


def response_states(model: LladaModel, rows: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """A function from ids (B, L) to the hidden states (B, R, D) of the response; a prompt apart from it is read once."""
    attention_mask, response_mask = rows["attention_mask"], rows["response_mask"]
    if isinstance(model, MaskedFromCausal):
        return model.response_reader(attention_mask, response_mask)
    columns = response_columns(response_mask)
    return lambda ids: model.hidden(model.embed(ids), attention_mask, response_mask=response_mask)[:, -columns:]


def response_logits(model: LladaModel, rows: dict[str, Tensor], guidance: float) -> Callable[[Tensor], Tensor]:
    """A function from ids (B, L) to response logits (B, R, V), with guidance un + (w + 1)(c - un); `un` sees the prompt masked.

    w = 0 is the conditional model in one forward pass; otherwise two.
    """
    conditional = response_states(model, rows)
    unconditional = response_states(model, rows) if guidance != 0 else None

    def logits(xt: Tensor) -> Tensor:
        found = model.lm_head(conditional(xt))
        if unconditional is not None:
            without = model.lm_head(unconditional(torch.where(rows["response_mask"], xt, model.mask_id)))
            found = without + (guidance + 1) * (found - without)
        return found

    return logits


def guided_logits(model: LladaModel, rows: dict[str, Tensor], guidance: float) -> Callable[[Tensor], Tensor]:
    """`response_logits` for generation: the mask token itself is never generated."""
    read = response_logits(model, rows, guidance)

    def logits(xt: Tensor) -> Tensor:
        found = read(xt)
        found[..., model.mask_id] = float("-inf")
        return found

    return logits


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
    response_mask = rows["response_mask"]
    length = response_columns(response_mask)
    blocks = block_count(length, block_length)
    block_length = length // blocks
    if steps % blocks:
        raise UsageError(
            f"forwards={steps} must be a multiple of the {blocks} blocks; type forwards={blocks} or {2 * blocks}"
        )
    if steps > length:
        raise UsageError(f"forwards={steps} exceeds the {length} tokens to fill; type forwards={length} or less")
    if remasking not in get_args(Remasking):
        raise UsageError(f"remasking={remasking} is not known; type low_confidence or random")

    read = guided_logits(model, rows, guidance)
    xt = torch.where(response_mask, model.mask_id, rows["input_ids"])
    for block in range(blocks):
        start, end = block * block_length, (block + 1) * block_length
        for count in linear_transfer_counts(block_length, steps // blocks):
            # 1. a draw for every response position
            logits = read(xt)
            drawn = sample_categorical(logits, temperature, generator)  # (B, R)
            # 2. the confidence of each; only masked positions of this block compete
            if remasking == "low_confidence":
                confidence = probability_of(drawn, logits)
            else:
                confidence = torch.rand(drawn.shape, generator=generator, device=drawn.device, dtype=torch.float64)
            response = xt[:, -length:]
            competing = masked_in_block(response, model.mask_id, start, end)
            confidence = confidence.masked_fill(~competing, -1.0)
            # 3. keep the scheduled number
            kept = torch.zeros_like(competing).scatter(1, confidence.topk(count, dim=-1).indices, True)
            xt[:, -length:] = torch.where(kept, drawn, response)
            if on_tokens is not None:
                on_tokens(xt[:, -length:].clone())
    return xt[:, -length:].clone()


class RuleTexts(NamedTuple):
    """responses (B, R) and the forward passes that each row needed, (B,)."""

    responses: Tensor
    forward_passes: Tensor


@torch.no_grad()
def generate_by_rule(
    model: LladaModel,
    rows: dict[str, Tensor],
    generator: Generator,
    *,
    rule: CommitRule,
    block_length: int | None = None,
    temperature: float = 0.0,
    guidance: float = 0.0,
    on_tokens: TokenCallback | None = None,
) -> RuleTexts:
    """Like `generate_masked_diffusion`, where `rule` chooses the positions of each forward pass.

    A block ends when every row has filled it; a row counts only the passes in which it still had masked positions of the
    block. Guidance doubles the passes.
    """
    response_mask = rows["response_mask"]
    length = response_columns(response_mask)
    blocks = block_count(length, block_length)
    block_length = length // blocks
    read = guided_logits(model, rows, guidance)
    xt = torch.where(response_mask, model.mask_id, rows["input_ids"])
    passes = torch.zeros(len(xt), dtype=torch.long, device=xt.device)
    for block in range(blocks):
        start, end = block * block_length, (block + 1) * block_length
        while bool((competing := masked_in_block(xt[:, -length:], model.mask_id, start, end)).any()):
            # 1. a draw for every response position, its probability and the entropy behind it
            logits = read(xt)
            drawn = sample_categorical(logits, temperature, generator)
            log_p = logits.double().log_softmax(-1)
            entropy = -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)
            # 2. the positions that the rule commits
            commit = rule(probability_of(drawn, logits), entropy, competing)
            xt[:, -length:] = torch.where(commit, drawn, xt[:, -length:])
            passes += competing.any(-1).long() * (1 if guidance == 0 else 2)
            if on_tokens is not None:
                on_tokens(xt[:, -length:].clone())
    return RuleTexts(xt[:, -length:].clone(), passes)


def block_count(length: int, block_length: int | None) -> int:
    """How many blocks of `block_length` a response of `length` has; one where it is None. Errors: UsageError."""
    if block_length is not None and (block_length < 1 or length % block_length):
        raise UsageError(f"block_length={block_length} must divide the response length {length}")
    return length // (block_length or length)


def masked_in_block(response: Tensor, mask_id: int, start: int, end: int) -> Tensor:
    """Masked positions of responses (B, R) from column start to end (exclusive)."""
    masked = response == mask_id
    masked[:, :start] = False
    masked[:, end:] = False
    return masked


def probability_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """p(token) of tokens (B, R) under logits (B, R, V), float64."""
    return torch.softmax(logits.double(), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


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


class RuleDecoder:
    """`generate_by_rule` as a `Decoder`. forwards: the most that a text can need; `forward_passes` has the last batch's own."""

    method = "teacher"
    refines = True

    def __init__(
        self,
        model: LladaModel,
        rule: CommitRule,
        response_length: int,
        *,
        temperature: float = 0.0,
        block_length: int | None = None,
        guidance: float = 0.0,
    ) -> None:
        self.model, self.rule = model, rule
        self.forwards = response_length * (1 if guidance == 0 else 2)
        self.temperature, self.block_length, self.guidance = temperature, block_length, guidance
        self.name = f"teacher, {rule.name}"
        self.forward_passes: Tensor | None = None

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        found = generate_by_rule(
            self.model,
            rows,
            generator,
            rule=self.rule,
            block_length=self.block_length,
            temperature=self.temperature,
            guidance=self.guidance,
            on_tokens=on_tokens,
        )
        self.forward_passes = found.forward_passes
        return found.responses
