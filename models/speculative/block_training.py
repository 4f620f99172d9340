r"""Training a block drafter on texts of its target: the blocks of a text, their loss, and how far they would survive.

Legend: B texts, T input positions, A anchors of a text, N blocks, k tokens of a block, W positions of a window, M scored
positions, C columns of the drafter's distributions (`BlockDrafter`), F numbers of all chosen layers together.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from models.backbones.causal_lm import scored_logits_and_states
from models.functional.block_draft import DraftLoss, Survival, draft_loss, expected_survival
from models.functional.next_token import CausalText
from models.functional.precision import at_least_float32
from models.functional.uniform import uniform
from models.speculative.block_drafter import BlockDrafter
from models.speculative.distribution import MixtureDist
from models.speculative.likelihood import log_probs_below


class Read(NamedTuple):
    """What the verifiers make of texts.

    states (B, T, F); log_q (M, C): q* at the scored positions, in their order and in the drafter's columns.
    """

    states: Tensor
    log_q: Tensor

    def halved(self) -> "Read":
        """In numbers of two bytes: bfloat16, whose range states need, and float16, which is finer."""
        return Read(self.states.bfloat16(), self.log_q.half())


class Blocks(NamedTuple):
    """Blocks of texts behind their anchors, the last committed tokens.

    row, anchor (N,): the text and the position of the anchor. last (N,): its token. tokens (N, k), at (N, k): the tokens after
    it and the index of each in M. counts (N, k) bool: those that are scored, up to the first that is not.
    """

    row: Tensor
    anchor: Tensor
    last: Tensor
    tokens: Tensor
    at: Tensor
    counts: Tensor


class BlockTerms(NamedTuple):
    """loss: see `draft_loss`. survival: see `expected_survival`. drafts: N."""

    loss: DraftLoss
    survival: Survival
    drafts: int


@torch.no_grad()
def read_texts(
    verifiers: Mapping[str, nn.Module], drafter: BlockDrafter, mixture: MixtureDist, text: CausalText
) -> Read:
    """One forward pass of each verifier; a single one is q* itself."""
    found = {
        name: scored_logits_and_states(model, text, drafter.state_layers[name]) for name, model in verifiers.items()
    }
    states = torch.cat([own for _, own in found.values()], -1)
    both = [mixture.tempered(log_probs_below(logits, drafter.vocab_size)) for logits, _ in found.values()]
    return Read(states, drafter.in_columns(mixture(both[0], both[-1]).log_q))


def draw_anchors(text: CausalText, most: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rows and positions (N,) of at most `most` anchors a text, without replacement among those whose next token is scored."""
    order = uniform(*text.weights.shape, generator=generator).masked_fill(~text.weights, -1.0)
    anchors = order.topk(min(most, order.shape[1]), -1).indices
    rows = torch.arange(len(anchors), device=anchors.device).unsqueeze(-1).expand_as(anchors)
    scored = text.weights.gather(1, anchors)
    return rows[scored], anchors[scored]


def blocks_at(text: CausalText, row: Tensor, anchor: Tensor, length: int, scored: Tensor | None = None) -> Blocks:
    """The blocks of `length` tokens behind anchors (N,) of rows (N,). scored (N,): of each, its first tokens; None: all."""
    place = anchor.unsqueeze(-1) + torch.arange(
        length, device=anchor.device
    )  # of the position that predicts each token
    inside = place < text.ids.shape[1]
    place = place.clamp(max=text.ids.shape[1] - 1)
    counts = (text.weights[row.unsqueeze(-1), place] & inside).long().cumprod(-1).bool()
    if scored is not None:
        counts &= torch.arange(length, device=anchor.device) < scored.unsqueeze(-1)
    index = text.weights.flatten().long().cumsum(0).sub(1).clamp(min=0).view_as(text.ids)
    at = index[row.unsqueeze(-1), place]
    return Blocks(row, anchor, text.ids[row, anchor], text.targets[row.unsqueeze(-1), place], at, counts)


def drafted_log_probs(
    drafter: BlockDrafter, read: Read, text: CausalText, blocks: Blocks, mixture: MixtureDist, generator: Generator
) -> Tensor:
    """log ψ (N, k, C) of the blocks behind their anchors, before top-k and top-p cut it."""
    fractions = uniform(*blocks.tokens.shape, generator=generator).double()
    # 1. as many blocks for every text, so that those of a text share its keys and values
    slot, most = _slots(blocks.row, len(text.ids))
    anchor, last, tokens, fractions = (
        _in_slots(part, slot, most * len(text.ids)) for part in (blocks.anchor, blocks.last, blocks.tokens, fractions)
    )
    # 2. the window of each
    distance = anchor.view(-1, most, 1) - torch.arange(text.ids.shape[1], device=anchor.device)
    seen = (distance > 0) & (distance <= drafter.window)
    if text.attention_mask is not None:
        seen = seen & text.attention_mask.bool().unsqueeze(1)
    # 3. every position of a text is read once
    projected = drafter.project(drafter.mix_states(read.states))
    # 4. empty slots do not pass the output layer
    return drafter.log_probs(projected, seen.flatten(0, 1), last, tokens, fractions, mixture.tempered, anchor, slot)


def _slots(row: Tensor, texts: int) -> tuple[Tensor, int]:
    """Places (N,) for blocks of rows (N,), M for each text, those of a text one after the other; and M."""
    order = row.argsort(stable=True)
    counts = torch.bincount(row, minlength=texts)
    before = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    most = max(1, int(counts.max()))
    return torch.empty_like(row).scatter(0, order, row[order] * most + before), most


def _in_slots(part: Tensor, slot: Tensor, slots: int) -> Tensor:
    """What each block has (N, ...) in its place of `slots`; 0 elsewhere."""
    return part.new_zeros(slots, *part.shape[1:]).index_copy(0, slot, part)


def block_terms(
    drafter: BlockDrafter,
    read: Read,
    text: CausalText,
    blocks: Blocks,
    mixture: MixtureDist,
    generator: Generator,
    *,
    ce: float,
    tv: float,
    decay: float,
) -> BlockTerms:
    """The loss of the blocks, with a gradient to the drafter, and how far they survive token verification."""
    logp = drafted_log_probs(drafter, read, text, blocks, mixture, generator)
    log_q, tokens = at_least_float32(read.log_q[blocks.at]), drafter.columns_of(blocks.tokens)
    loss = draft_loss(logp, log_q, tokens, blocks.counts, ce=ce, tv=tv, decay=decay)
    with torch.no_grad():
        survival = expected_survival(mixture.truncated(logp), log_q, tokens, blocks.counts)
    return BlockTerms(loss, survival, len(blocks.row))
