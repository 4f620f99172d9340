r"""The planner: text in, concepts out: type after type, types side by side, or all slots at once.

Reads [<BOS>, text, <PLAN>] and then its own plan. Given the prompt alone it is the prior p(z | u); given prompt and response
the posterior q(z | u, x): one network, told apart by what it reads.
Legend: B batch, T text columns, C columns of a plan's block, S slots, W choices of a slot, D width.
"""

from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Generator, Tensor

from models.concept.layout import Columns, Planning, joined
from models.concept.quantiser import Quantiser
from models.concept.unified import Reading, UnifiedModel
from models.concept.vocabulary import END
from models.functional.errors import require_choice
from models.functional.gumbel import Choice, gumbel_noise, gumbel_st, one_hot_argmax, straight_through

Chooser = Callable[[Tensor], Choice]  # logits (B, W) -> what is chosen


class Made(NamedTuple):
    """One slot's choice: logits (B, W), and embeddings (B, D).

    mix - base is added to what the table says: nothing where they are equal, and then the gradient of mix alone.
    soft, hard: the relaxed choice and the one made, or the point and its code.
    """

    logits: Tensor
    choice: Choice
    mix: Tensor
    base: Tensor
    soft: Tensor
    hard: Tensor


class Coder:
    """Chooses a slot's code by a quantiser; share: how far from the point to its code the embedding stands.

    points: those of the slots chosen so far, (B, d) each, held.
    """

    def __init__(self, quantiser: Quantiser, share: float = 1.0) -> None:
        self.quantiser, self.share = quantiser, share
        self.points: dict[int, Tensor] = {}

    def __call__(self, state: Tensor, slot: int) -> Made:
        coded = self.quantiser(state, slot, self.share)
        self.points[slot] = coded.point.detach()
        return Made(coded.logits, coded.choice, coded.embeds, coded.hard_embeds, coded.soft_embeds, coded.hard_embeds)


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
    """Plans with a shared `UnifiedModel`; it has no weights of its own.

    planning: what a slot's choice may look at beside the text (`layout.Planning`). quantiser: whose codes it scores in place
    of the concepts' heads.
    """

    def __init__(
        self, model: UnifiedModel, planning: Planning = "sequential", quantiser: Quantiser | None = None
    ) -> None:
        require_choice("module.planning", planning, get_args(Planning))
        self.model, self.layout, self.planning, self.quantiser = model, model.layout, planning, quantiser

    def draw(self, text: Tensor, mask: Tensor, choose: Chooser | Coder) -> Plan:
        """A plan for each text (B, T), real where mask (B, T) bool, round by round with a key-value cache.

        choose: what is made of each slot's logits, or a `Coder`, what is made of the state before the slot.
        """
        model, layout = self.model, self.layout
        choices = torch.full((len(text), len(layout.slot_columns)), END, device=text.device)
        reading, made = Reading(model, apart=self.planning != "sequential"), {}
        # 1. the text and <PLAN>
        opening = self._opening(text, mask)
        for k, (columns, slots) in enumerate(layout.rounds(self.planning)):
            # 2. what stands before the slots of this round
            block = self._read(choices, made)
            part = block[0][:, columns], block[1].take(columns)
            if k == 0:
                part = torch.cat([opening[0], part[0]], 1), joined(opening[1], part[1])
            states = reading.read(*part)[:, -len(slots) :]
            # 3. a choice for each of them
            for state, slot in zip(states.unbind(1), slots, strict=True):
                made[slot] = choose(state, slot) if isinstance(choose, Coder) else self._made(state, slot, choose)
            numbers = torch.stack([made[slot].choice.hard.argmax(-1) for slot in slots], 1)
            choices = self._closed(choices.index_copy(1, torch.tensor(slots, device=text.device), numbers))
        # 4. the whole
        parts = [made[slot] for slot in range(choices.shape[1])]
        logits, soft, hard, soft_embeds, hard_embeds = (
            torch.stack(part, 1) for part in zip(*((m.logits, *m.choice, m.soft, m.hard) for m in parts), strict=True)
        )
        ids, embeds = layout.block(choices), self._mixed(layout.block(choices), made)[0]
        is_open = layout.open_slots(choices)
        return Plan(ids, embeds, choices, is_open, logits, soft, hard, soft_embeds, hard_embeds)

    def score(self, text: Tensor, mask: Tensor, choices: Tensor) -> Tensor:
        """Logits (B, S, W) of given choices, all slots in one forward."""
        opening, block = self._opening(text, mask), self._read(choices, {})
        embeds, columns = torch.cat([opening[0], block[0]], 1), joined(opening[1], block[1])
        states = self.model.states(embeds, columns, apart=self.planning != "sequential")
        before = opening[0].shape[1] + self.layout.slot_columns.to(text.device) - 1
        states = states[:, before]
        if self.quantiser is None:
            return self.model.choice_logits(states)
        return torch.stack([self.quantiser(state, slot).logits for slot, state in enumerate(states.unbind(1))], 1)

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

    def _read(self, choices: Tensor, made: dict[int, Made]) -> tuple[Tensor, Columns]:
        """The block as the planner itself reads it: without the concepts where all are chosen at once."""
        if self.planning == "slots":
            return self._embedded(self.layout.unwritten(len(choices)).to(choices.device))
        return self._mixed(self.layout.block(choices), made)

    def _mixed(self, ids: Tensor, made: dict[int, Made]) -> tuple[Tensor, Columns]:
        """The block's columns, with the gradients of what was chosen at its slots."""
        embeds, columns = self._embedded(ids)
        if not made:
            return embeds, columns
        slots = self.layout.slot_columns[list(made)].to(ids.device)
        moved = torch.stack([m.mix - m.base for m in made.values()], 1)
        return embeds.index_copy(1, slots, embeds[:, slots] + moved), columns

    def _made(self, state: Tensor, slot: int, choose: Chooser) -> Made:
        logits, table = self.model.slot_logits(state, slot), self.model.choice_embeddings(slot)
        choice = choose(logits)
        soft, hard = (weights @ table for weights in choice)
        return Made(logits, choice, soft, soft.detach(), soft, hard)

    def _embedded(self, ids: Tensor) -> tuple[Tensor, Columns]:
        columns = self.layout.of_block(ids)
        return self.model.embed(ids, columns.type_ids), columns

    def _closed(self, choices: Tensor) -> Tensor:
        return choices.masked_fill(~self.layout.open_slots(choices), END)


def _column(token: int, like: Tensor) -> Tensor:
    return like.new_full((len(like), 1), token)
