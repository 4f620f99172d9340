"""Generation by unmasking, a few tokens in each forward pass (Nie et al., LLaDA, 2025, algorithms 4 and 5).

The number of tokens of a pass is scheduled (`generate_masked_diffusion`) or follows the confidence (`generate_by_rule`).

Legend: B batch, L length, R response columns, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Generator, Tensor

from models.backbones.bidirectional import is_block_causal
from models.backbones.llada import LladaModel
from models.diffusion.commit_rules import CommitRule
from models.diffusion.readers import NOTHING_REUSED, Reader, response_reader
from models.functional.errors import UsageError
from models.functional.gumbel import sample_categorical
from models.functional.next_token import EndIds, are_ends, as_end_ids
from models.functional.nll import at_chosen
from models.functional.rows import response_columns
from models.interfaces.decoder import TokenCallback
from models.interfaces.masked_sampling import (
    MaskedSampling,
    Remasking,
    ReusedColumns,
    require_dividing,
    temperature_name,
)


def linear_transfer_counts(tokens: int, steps: int) -> list[int]:
    """How many tokens to reveal at each step: floor(tokens / steps), and one more on the first tokens % steps steps."""
    whole, rest = divmod(tokens, steps)
    return [whole + (step < rest) for step in range(steps)]


def response_logits(
    model: LladaModel, rows: dict[str, Tensor], guidance: float, reused: ReusedColumns = NOTHING_REUSED
) -> Reader:
    """A function from ids (B, L), start and end to logits (B, end - start, V) of these response columns.

    Guidance is un + (w + 1)(c - un); `un` sees the prompt masked. w = 0 is the conditional model in one forward pass; otherwise
    two, with keys and values of their own.
    """
    conditional = response_reader(model, rows, reused)
    unconditional = response_reader(model, rows, reused) if guidance != 0 else None

    def logits(xt: Tensor, start: int, end: int) -> Tensor:
        found = model.lm_head(conditional(xt, start, end))
        if unconditional is not None:
            blind = torch.where(rows["response_mask"], xt, model.mask_id)
            without = model.lm_head(unconditional(blind, start, end))
            found = without + (guidance + 1) * (found - without)
        return found

    return logits


def guided_logits(
    model: LladaModel, rows: dict[str, Tensor], guidance: float, reused: ReusedColumns = NOTHING_REUSED
) -> Reader:
    """`response_logits` for generation: the mask token itself is never generated."""
    read = response_logits(model, rows, guidance, reused)

    def logits(xt: Tensor, start: int, end: int) -> Tensor:
        found = read(xt, start, end)
        found[..., model.mask_id] = float("-inf")
        return found

    return logits


def passes_of_guidance(guidance: float) -> int:
    """Forward passes for one look at the logits: `response_logits` reads a row without its prompt, too."""
    return 1 if guidance == 0 else 2


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
    reused: ReusedColumns = NOTHING_REUSED,
    ends_last: EndIds = None,
    on_tokens: TokenCallback | None = None,
) -> Tensor:
    """Responses (B, R) for rows laid out as prompt columns then R response columns.

    Blocks of `block_length` response tokens (all of them by default) are filled left to right, in `steps` forward passes.
    Each of these draws all masked tokens of the block and keeps the scheduled number: the most probable draws
    (`low_confidence`; at temperature 1 this favours a few safe texts) or randomly chosen ones (`random`, ancestral sampling).
    reused: what is not read in every pass; a pass counts as one, whatever it reads. ends_last: draws of these tokens are
    committed after all others (`confidence_eos_eot_inf` in LLaDA's code): the padding behind a text is easily predicted, and
    once it is committed, the text must end before it. on_tokens: see `Decoder`.
    """
    length = response_columns(rows["response_mask"])
    blocks = block_count(length, sampling_blocks(model, block_length))
    block_length = length // blocks
    if steps % blocks:
        raise UsageError(
            f"forwards={steps} must be a multiple of the {blocks} blocks; type forwards={blocks} or {2 * blocks}"
        )
    if steps > length:
        raise UsageError(f"forwards={steps} exceeds the {length} tokens to fill; type forwards={length} or less")
    if remasking not in get_args(Remasking):
        raise UsageError(f"remasking={remasking} is not known; type low_confidence or random")

    read = guided_logits(model, rows, guidance, reused)
    xt = torch.where(rows["response_mask"], model.mask_id, rows["input_ids"])
    response = xt[:, -length:]
    for start in range(0, length, block_length):
        end = start + block_length
        for count in linear_transfer_counts(block_length, steps // blocks):
            # 1. a draw for every position of the block
            logits = read(xt, start, end)
            drawn = sample_categorical(logits, temperature, generator)  # (B, block_length)
            # 2. the confidence of each; only masked positions compete
            if remasking == "low_confidence":
                confidence = probability_of(drawn, logits)
            else:
                confidence = torch.rand(drawn.shape, generator=generator, device=drawn.device, dtype=torch.float64)
            confidence = ranked_last(confidence, are_ends(drawn, ends_last))
            block = response[:, start:end]
            confidence = confidence.masked_fill(block != model.mask_id, -2.0)
            # 3. keep the scheduled number
            kept = torch.zeros_like(block, dtype=torch.bool).scatter(1, confidence.topk(count, dim=-1).indices, True)
            response[:, start:end] = torch.where(kept, drawn, block)
            if on_tokens is not None:
                on_tokens(response.clone())
    return response.clone()


class RuleTexts(NamedTuple):
    """responses (B, R), the forward passes that each row needed, (B,), and those that were made for the batch."""

    responses: Tensor
    forward_passes: Tensor
    batch_passes: int


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
    reused: ReusedColumns = NOTHING_REUSED,
    end_ids: EndIds = None,
    ends_last: bool = False,
    on_tokens: TokenCallback | None = None,
) -> RuleTexts:
    """Like `generate_masked_diffusion`, where `rule` chooses the positions of each forward pass.

    The last block may be shorter. A block ends when every row has filled it; a row counts only the passes in which it still
    had masked positions of the block. Guidance doubles the passes.
    end_ids: where a text ends. A row with one of them in an earlier block takes no more passes: the first of them fills it.
    ends_last: they are committed once a row draws nothing else, and then all together.
    """
    length = response_columns(rows["response_mask"])
    block_length = sampling_blocks(model, block_length) or length
    read = guided_logits(model, rows, guidance, reused)
    xt = torch.where(rows["response_mask"], model.mask_id, rows["input_ids"])
    response = xt[:, -length:]
    passes, made = torch.zeros(len(xt), dtype=torch.long, device=xt.device), 0
    each = passes_of_guidance(guidance)
    for start in range(0, length, block_length):
        end = min(start + block_length, length)
        ended = are_ends(response[:, :start], end_ids).any(-1, keepdim=True)
        if start and as_end_ids(end_ids):
            response[:, start:end] = torch.where(ended, as_end_ids(end_ids)[0], response[:, start:end])
        while bool((competing := response[:, start:end] == model.mask_id).any()):
            # 1. a draw for every position of the block; of masked ones its probability and the entropy behind it
            logits = read(xt, start, end)
            drawn = sample_categorical(logits, temperature, generator)
            p = torch.softmax(logits[competing].double(), -1)  # (M, V): with a large vocabulary as dear as the pass
            probability = at_chosen(competing, p.gather(-1, drawn[competing].unsqueeze(-1)).squeeze(-1))
            entropy = at_chosen(competing, torch.special.entr(p).sum(-1))
            # 2. the positions that the rule commits
            others = competing & ~are_ends(drawn, end_ids if ends_last else None)
            only_ends = competing & ~others.any(-1, keepdim=True)
            commit = only_ends | rule(probability, entropy, others)
            response[:, start:end] = torch.where(commit, drawn, response[:, start:end])
            passes += competing.any(-1).long() * each
            made += each
            if on_tokens is not None:
                on_tokens(response.clone())
    return RuleTexts(response.clone(), passes, made)


def ranked_last(confidence: Tensor, last: Tensor) -> Tensor:
    """Confidence (B, R) in 0..1 of draws; less 1 where `last` (B, R) bool, below that of all others."""
    return confidence - last.to(confidence.dtype)


def block_count(length: int, block_length: int | None) -> int:
    """How many blocks of `block_length` a response of `length` has; one where it is None. Errors: UsageError."""
    require_dividing("block_length", block_length, length)
    return length // (block_length or length)


def sampling_blocks(model: LladaModel, block_length: int | None, option: str = "block_length") -> int | None:
    """Tokens of a block: those of a block-causal model are its own. Errors: UsageError where others are asked for."""
    if not is_block_causal(model):
        return block_length
    own = model.config.block_length
    if block_length not in (None, own):
        raise UsageError(
            f"{option}={block_length}: this model was trained by block diffusion with blocks of "
            f"{own or 'the whole response'}; type module.{option}=null"
        )
    return own


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
        reused: ReusedColumns = NOTHING_REUSED,
        ends_last: EndIds = None,
    ) -> None:
        self.model, self.steps = model, forwards
        self.forwards = forwards * passes_of_guidance(guidance)
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "remasking": remasking,
            "block_length": block_length,
            "guidance": guidance,
            "reused": reused,
            "ends_last": ends_last,
        }
        self.name = f"teacher, {temperature_name(temperature)}"

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        return generate_masked_diffusion(
            self.model, rows, generator, steps=self.steps, on_tokens=on_tokens, **self.options
        )


class RuleDecoder:
    """`generate_by_rule` as a `Decoder`. forwards: the most that a text can need.

    forward_passes, batch_passes: those of the last batch's texts, and of the batch.
    """

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
        reused: ReusedColumns = NOTHING_REUSED,
        end_ids: EndIds = None,
        ends_last: bool = False,
    ) -> None:
        self.model, self.rule = model, rule
        self.forwards = response_length * passes_of_guidance(guidance)
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "block_length": block_length,
            "guidance": guidance,
            "reused": reused,
            "end_ids": end_ids,
            "ends_last": ends_last,
        }
        at = f", {temperature_name(temperature)}" if temperature else ""  # 0 as in the papers of the rules
        self.name = f"teacher, {rule.name}{at}"
        self.forward_passes: Tensor | None = None
        self.batch_passes: int | None = None

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        found = generate_by_rule(self.model, rows, generator, rule=self.rule, on_tokens=on_tokens, **self.options)
        self.forward_passes, self.batch_passes = found.forward_passes, found.batch_passes
        return found.responses


def scheduled_decoders(model: LladaModel, how: MaskedSampling, end_ids: EndIds = None) -> list[MaskedDiffusionDecoder]:
    """A decoder for each number of forward passes and temperature. end_ids: where texts end, which `how.ends_last` needs."""
    last = {"ends_last": how.last(end_ids)}
    return [MaskedDiffusionDecoder(model, n, **how.options | {"temperature": t} | last) for n, t in how.rows]


def rule_decoders(
    model: LladaModel,
    rules: Sequence[CommitRule],
    how: MaskedSampling,
    response_length: int,
    end_ids: EndIds = None,
) -> list[RuleDecoder]:
    """A decoder for each rule, those of `how.commit_rules`. end_ids: where texts end, see `generate_by_rule`."""
    return [RuleDecoder(model, rule, response_length, end_ids=end_ids, **how.rule_options) for rule in rules]
