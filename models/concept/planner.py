r"""The planner: text in, concepts out, type after type, each slot given those before it.

Reads [<BOS>, text, <PLAN>] and then its own plan. Given the prompt alone it is the prior p(z | u); given prompt and response
the posterior q(z | u, x): one network, told apart by what it reads.
Legend: B batch, T text columns, C columns of a plan's block, S slots, W choices of a slot, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from models.concept.layout import Columns, joined
from models.concept.unified import Reading, UnifiedModel
from models.concept.vocabulary import END
from models.functional.gumbel import Choice, gumbel_noise, gumbel_st, one_hot_argmax, straight_through

Chooser = Callable[[Tensor], Choice]  # logits (B, W) -> what is chosen


class Plan(NamedTuple):
    """ids, embeds: the block that an executor reads, (B, C) and (B, C, D); mixed straight-through where choices are relaxed.

    choices (B, S), 0 for the end of a type; open_slots (B, S) bool; logits (B, S, W) that they were chosen from.
    soft, hard (B, S, W): weights of the relaxed and the made choice. soft_embeds, hard_embeds (B, S, D): what these mix.
    """

    ids: Tensor
    embeds: Tensor
    choices: Tensor
    open_slots: Tensor
    logits: Tensor
    soft: Tensor
    hard: Tensor
    soft_embeds: Tensor
    hard_embeds: Tensor

    @property
    def stops(self) -> Tensor:
        """1 where a slot ended its type or came after the end, with a straight-through gradient, (B, S)."""
        stop = straight_through(self.hard[..., END], self.soft[..., END])
        return stop.masked_fill(~self.open_slots, 1.0)


def greedy(logits: Tensor) -> Choice:
    """The most probable choice."""
    hard = one_hot_argmax(logits)
    return Choice(hard, hard)


def sampled(generator: Generator, temperature: float = 1.0) -> Chooser:
    """A draw from softmax(logits / temperature); the most probable choice at temperature 0."""

    def choose(logits: Tensor) -> Choice:
        return greedy(logits / temperature + gumbel_noise(logits, generator)) if temperature else greedy(logits)

    return choose


def relaxed(generator: Generator, temperature: float, noise: float = 1.0) -> Chooser:
    """A draw from softmax(logits) whose gradient is that of the choice relaxed at `temperature`.

    noise scales what makes it a draw: 0 is the most probable choice, with the same kind of gradient.
    """
    return lambda logits: gumbel_st(logits, temperature, noise * gumbel_noise(logits, generator))


def dictated(choices: Tensor) -> Chooser:
    """The choices (B, S) that are given, slot after slot, whatever the logits; for one plan of each text."""
    slots = iter(choices.unbind(-1))

    def choose(logits: Tensor) -> Choice:
        hard = torch.zeros_like(logits).scatter(-1, next(slots).unsqueeze(-1), 1.0)
        return Choice(hard, hard)

    return choose


class Planner:
    """Plans with a shared `UnifiedModel`; it has no weights of its own."""

    def __init__(self, model: UnifiedModel) -> None:
        self.model, self.layout = model, model.layout

    def draw(self, text: Tensor, mask: Tensor, choose: Chooser) -> Plan:
        """A plan for each text (B, T), real where mask (B, T) bool, slot by slot with a key-value cache."""
        model, layout, slots = self.model, self.layout, len(self.layout.slot_columns)
        choices = torch.full((len(text), slots), END, device=text.device)
        reading, made, embeds, logits = Reading(model), [], [], []
        # 1. the text, <PLAN> and the first separator
        opening, block = self._opening(text, mask), self._embedded(layout.block(choices))
        first = int(layout.slot_columns[0])
        embeds.append(block[0][:, :first])
        opened = torch.cat([opening[0], embeds[0]], 1)
        states = reading.read(opened, joined(opening[1], block[1].between(0, first)))
        for slot in range(slots):
            # 2. a choice given everything before it
            logits.append(model.slot_logits(states[:, -1], slot))
            made.append(choose(logits[-1]))
            choices = choices.index_copy(1, torch.tensor([slot], device=text.device), _number(made[-1]))
            # 3. read it, and what stands between it and the next slot
            here = int(layout.slot_columns[slot])
            after = int(layout.slot_columns[slot + 1]) if slot + 1 < slots else layout.columns
            own, columns = self._embedded(layout.block(self._closed(choices)))
            mixed = straight_through(own[:, here], made[-1].soft @ model.choice_embeddings(slot))
            embeds.append(torch.cat([mixed.unsqueeze(1), own[:, here + 1 : after]], 1))
            if slot + 1 < slots:
                states = reading.read(embeds[-1], columns.between(here, after))
        # 4. the whole
        choices = self._closed(choices)
        soft, hard = (torch.stack(part, 1) for part in zip(*made, strict=True))
        tables = torch.stack([model.choice_embeddings(slot) for slot in range(slots)])  # (S, W, D)
        mixes = (torch.einsum("bsw,swd->bsd", weights, tables) for weights in (soft, hard))
        is_open = layout.open_slots(choices)
        return Plan(
            layout.block(choices), torch.cat(embeds, 1), choices, is_open, torch.stack(logits, 1), soft, hard, *mixes
        )

    def score(self, text: Tensor, mask: Tensor, choices: Tensor) -> Tensor:
        """Logits (B, S, W) of given choices, all slots in one forward."""
        opening, block = self._opening(text, mask), self._embedded(self.layout.block(choices))
        states = self.model.states(torch.cat([opening[0], block[0]], 1), joined(opening[1], block[1]))
        before = opening[0].shape[1] + self.layout.slot_columns.to(text.device) - 1
        return self.model.choice_logits(states[:, before])

    def block(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, C) and embeddings (B, C, D) of given choices (B, S), as an executor reads them."""
        ids = self.layout.block(choices)
        return ids, self._embedded(ids)[0]

    def _opening(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Columns]:
        """[<BOS>, text, <PLAN>]: <BOS> stands before all padding, so that every column sees something."""
        v = self.layout.vocabulary
        ids = torch.cat([_column(v.bos, text), text, _column(v.plan, text)], 1)
        special = self.layout.of_special(text)
        columns = joined(special, self.layout.of_text(mask), special)
        return self.model.embed(ids, columns.type_ids), columns

    def _embedded(self, ids: Tensor) -> tuple[Tensor, Columns]:
        columns = self.layout.of_block(ids)
        return self.model.embed(ids, columns.type_ids), columns

    def _closed(self, choices: Tensor) -> Tensor:
        return choices.masked_fill(~self.layout.open_slots(choices), END)


def _number(choice: Choice) -> Tensor:
    return choice.hard.argmax(-1, keepdim=True)


def _column(token: int, like: Tensor) -> Tensor:
    return like.new_full((len(like), 1), token)
