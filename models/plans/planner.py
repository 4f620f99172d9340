r"""The planner: text in, concepts out: type after type, types in parallel, or all slots at once.

It reads [<BOS>, text, <PLAN>] and then its own plan. The same network is the prior p(z | u) where it reads the prompt alone,
and the posterior q(z | u, x) where it reads the response.
Legend: B batch, T text columns, C columns of a plan's block, S slots, W choices of a slot, D width.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, get_args

import torch
from torch import Generator, Tensor

from models.functional.errors import UsageError, require_choice
from models.functional.gumbel import Choice, gumbel_noise, gumbel_st, one_hot_argmax, straight_through
from models.plans.layout import Columns, Planning, joined
from models.plans.quantiser import Quantiser
from models.plans.unified import Reading, UnifiedModel
from models.plans.vocabulary import END, IMPOSSIBLE

Chooser = Callable[[Tensor], Choice]  # logits (B, n, W) of a round's n slots -> choices


class Made(NamedTuple):
    """The choices of a round's n slots: logits (B, n, W), weights (B, n, W) and embeddings (B, n, D).

    weights_soft, weights_hard: of the relaxed and of the hard choice. soft, hard: embeddings of the two, or of a quantiser's
    point and its code. moved: added to the embedding of the table; where choices are relaxed it is 0 and carries the gradient,
    with a quantiser it is the difference between what is read and the code.
    """

    logits: Tensor
    weights_soft: Tensor
    weights_hard: Tensor
    soft: Tensor
    hard: Tensor
    moved: Tensor


class Rounds:
    """The choices made so far, in the order of the rounds."""

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.rounds: list[Made] = []

    def add(self, slots: list[int], made: Made) -> None:
        self.slots += slots
        self.rounds.append(made)

    def in_order(self) -> Made:
        """The choices of all slots in slot order, (B, S, ...) each."""
        order = torch.tensor(self.slots).argsort()
        return Made(*(torch.cat(part, 1)[:, order.to(part[0].device)] for part in zip(*self.rounds, strict=True)))


class Coder:
    """Chooses each slot's code with a quantiser; share: how far the embedding has moved from the point to its code.

    numbers: known codes (B,) of slots with `NamedCodes`, taken instead of the predicted ones; -1 where one is not known.
    points: of the coarse slots chosen so far, (B, d) each, without a gradient.
    """

    def __init__(self, quantiser: Quantiser, share: float = 1.0, numbers: Mapping[int, Tensor] | None = None) -> None:
        self.quantiser, self.share, self.numbers = quantiser, share, numbers or {}
        self.points: dict[int, Tensor] = {}

    def __call__(self, states: Tensor, slots: list[int]) -> Made:
        """Choices of these slots from the states (B, n, D) before them."""
        coded = self.quantiser(states, slots, self.share, self.numbers)
        for slot, own in zip(slots, coded, strict=True):
            if own.point is not None and slot in self.quantiser.coarse_slots:
                self.points[slot] = own.point.detach()
        made = (
            Made(c.logits, c.choice.soft, c.choice.hard, c.soft_embeds, c.hard_embeds, c.embeds - c.hard_embeds)
            for c in coded
        )
        return Made(*(torch.stack(part, 1) for part in zip(*made, strict=True)))


class Round(NamedTuple):
    """How the choices of a round's n slots came to be read.

    columns (n,) of the block; states (B, n, D) that were chosen from; moved (B, n, D), see `Made`.
    """

    columns: Tensor
    states: Tensor
    moved: Tensor


class Plan(NamedTuple):
    """ids, embeds: the block that an executor reads, (B, C) and (B, C, D); straight-through where choices are relaxed.

    choices (B, S), 0 for the end of a type; open_slots (B, S) bool; logits (B, S, W) that they were chosen from.
    soft, hard (B, S, W): weights of the relaxed and the hard choice. soft_embeds, hard_embeds (B, S, D): their embeddings.
    rounds: in which the slots were chosen; none where the choices were given.
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
    rounds: tuple[Round, ...] = ()

    @property
    def relaxation(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the relaxed and of the hard choices at open slots, (N, D) each, without a gradient."""
        return self.soft_embeds[self.open_slots].detach(), self.hard_embeds[self.open_slots].detach()

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
    """A draw from softmax(logits) with the gradient of the choice relaxed at `temperature`.

    noise: scale of the Gumbel noise; 0 takes the most probable choice, with the same kind of gradient.
    """
    return lambda logits: gumbel_st(logits, temperature, noise * gumbel_noise(logits, generator))


class Planner:
    """Plans with a shared `UnifiedModel`; it has no weights of its own.

    planning: what a slot's choice is conditioned on beside the text (`layout.Planning`). quantiser: gives the logits of the
    choices instead of the concepts' head.
    """

    def __init__(
        self, model: UnifiedModel, planning: Planning = "sequential", quantiser: Quantiser | None = None
    ) -> None:
        require_choice("module.planning", planning, get_args(Planning))
        for t in model.vocabulary.types:
            if quantiser is not None and t.levels > 1 and planning != "slots":
                raise UsageError(
                    f"module.types.{t.name}.levels={t.levels} chooses all levels of a concept at once; "
                    f"type module.planning.posterior=slots (not {planning}), or module.types.{t.name}.levels=1"
                )
        self.model, self.layout, self.planning, self.quantiser = model, model.layout, planning, quantiser

    def draw(self, text: Tensor, mask: Tensor, choose: Chooser | Coder, fixed: Mapping[int, int] | None = None) -> Plan:
        """A plan for each text (B, T), real where mask (B, T) bool, round by round with a key-value cache.

        choose: chooses from the slots' logits; a `Coder` chooses from the states before them. fixed: {slot: choice} that are
        given; slots that are read after them know them, earlier ones do not.
        """
        model, layout = self.model, self.layout
        choices = torch.full((len(text), len(layout.slot_columns)), END, device=text.device)
        reading, made = Reading(model, apart=self.planning != "sequential"), Rounds()
        rounds: list[Round] = []
        # 1. the text and <PLAN>
        opening = self._opening(text, mask)
        for k, (columns, slots) in enumerate(layout.rounds(self.planning)):
            # 2. the columns before the slots of this round
            block = self._read(choices, made)
            part = block[0][:, columns], block[1].take(columns)
            if k == 0:
                part = torch.cat([opening[0], part[0]], 1), joined(opening[1], part[1])
            states = reading.read(*part)[:, -len(slots) :]
            # 3. a choice for each of them
            own = choose(states, slots) if isinstance(choose, Coder) else self._made(states, slots, choose, fixed or {})
            made.add(slots, own)
            rounds.append(Round(layout.slot_columns[slots].to(text.device), states, own.moved))
            numbers = own.weights_hard.argmax(-1)
            choices = self._closed(choices.index_copy(1, torch.tensor(slots, device=text.device), numbers))
        # 4. the whole block
        ids = layout.block(choices)
        embeds = self._mixed(ids, made)[0]
        logits, soft, hard, soft_embeds, hard_embeds, _ = made.in_order()
        is_open = layout.open_slots(choices)
        return Plan(ids, embeds, choices, is_open, logits, soft, hard, soft_embeds, hard_embeds, tuple(rounds))

    def score(self, text: Tensor, mask: Tensor, choices: Tensor) -> Tensor:
        """Logits (B, S, W) of given choices (B, S), all slots in one forward pass."""
        return self.slot_logits(self.slot_states(text, mask, choices), choices)

    def slot_states(self, text: Tensor, mask: Tensor, choices: Tensor) -> Tensor:
        """Hidden states (B, S, D) from which the slots of given choices (B, S) are chosen."""
        opening, block = self._opening(text, mask), self._read(choices, Rounds())
        read = self.layout.columns_before_slots(self.planning).to(text.device)
        embeds, columns = torch.cat([opening[0], block[0][:, read]], 1), joined(opening[1], block[1].take(read))
        states = self.model.states(embeds, columns, apart=self.planning != "sequential")[:, opening[0].shape[1] :]
        before = self.layout.slot_columns.to(text.device) - 1
        return states[:, torch.searchsorted(read, before)]

    def score_many(self, text: Tensor, mask: Tensor, plans: Tensor) -> Tensor:
        """Logits (B, K, S, W) of K plans (B, K, S) of each text, which is read once."""
        reading = Reading(self.model, apart=self.planning != "sequential")
        reading.read(*self._opening(text, mask))
        reading.repeat(plans.shape[1])
        flat = plans.flatten(0, 1)
        states = self._before_slots(reading.read(*self._read(flat, Rounds())))
        return self.slot_logits(states, flat).unflatten(0, plans.shape[:2])

    def certain(self, choices: Tensor) -> Plan:
        """The plan of given choices (B, S) with probability 1; no text is read."""
        numbers = self.model.choices  # (S, W)
        embeds = self.model.new_table()[numbers[torch.arange(len(numbers), device=choices.device), choices]]
        hard = torch.nn.functional.one_hot(choices, numbers.shape[1]).to(embeds.dtype)
        ids, read = self.block(choices)
        logits = (1 - hard) * IMPOSSIBLE
        return Plan(ids, read, choices, self.layout.open_slots(choices), logits, hard, hard, embeds, embeds)

    def block(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, C) and embeddings (B, C, D) of given choices (B, S), as an executor reads them."""
        ids = self.layout.block(choices)
        return ids, self._embedded(ids)[0]

    def slot_logits(self, states: Tensor, choices: Tensor) -> Tensor:
        """Logits (B, S, W) of all slots of given choices (B, S) from the states (B, S, D) before them."""
        if self.quantiser is None:
            return self.model.choice_logits(states)
        return self.quantiser.logits(states, choices)

    def independent_slots(self) -> list[list[int]]:
        """All slots in the order in which they are chosen; those of one list do not depend on each other's choices."""
        rounds = [slots for _, slots in self.layout.rounds(self.planning)]
        if self.quantiser is None or self.quantiser.levels == 1:
            return rounds
        levels = self.layout.vocabulary.slot_levels.tolist()
        return [[s for s in rounds[0] if levels[s] == level] for level in range(self.quantiser.levels)]

    def _before_slots(self, states: Tensor) -> Tensor:
        """The states (B, S, D) before the slots, of the states (B, C, D) of a block's columns."""
        return states[:, self.layout.slot_columns.to(states.device) - 1]

    def _opening(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Columns]:
        """[<BOS>, text, <PLAN>]; <BOS> comes before the padding, so that every column has something to attend to."""
        v = self.layout.vocabulary
        ids = torch.cat([_column(v.bos, text), text, _column(v.plan, text)], 1)
        special = self.layout.of_special(text)
        columns = joined(special, self.layout.of_text(mask), special)
        return self.model.embed(ids, columns.type_ids), columns

    def _read(self, choices: Tensor, made: Rounds) -> tuple[Tensor, Columns]:
        """The block as the planner reads it: without concepts where all slots are chosen at once."""
        if self.planning == "slots":
            return self._embedded(self.layout.unwritten(len(choices)).to(choices.device))
        return self._mixed(self.layout.block(choices), made)

    def _mixed(self, ids: Tensor, made: Rounds) -> tuple[Tensor, Columns]:
        """The block's columns, with the gradients of the choices at its slots."""
        embeds, columns = self._embedded(ids)
        if not made.slots:
            return embeds, columns
        slots = self.layout.slot_columns[made.slots].to(ids.device)
        return embeds.index_add(1, slots, torch.cat([m.moved for m in made.rounds], 1).to(embeds.dtype)), columns

    def _made(self, states: Tensor, slots: list[int], choose: Chooser, fixed: Mapping[int, int]) -> Made:
        logits, table = self.model.choice_logits(states, slots), self.model.choice_embeddings(slots)
        for place, slot in enumerate(slots):
            if slot in fixed:
                others = torch.arange(logits.shape[-1], device=logits.device) != fixed[slot]
                logits = logits.index_fill(1, torch.tensor([place], device=logits.device), 0.0)
                logits[:, place, others] = IMPOSSIBLE
        choice = choose(logits)
        soft, hard = (torch.einsum("bsw,swd->bsd", weights.to(table.dtype), table) for weights in choice)
        return Made(logits, *choice, soft, hard, soft - soft.detach())

    def _embedded(self, ids: Tensor) -> tuple[Tensor, Columns]:
        columns = self.layout.of_block(ids)
        return self.model.embed(ids, columns.type_ids), columns

    def _closed(self, choices: Tensor) -> Tensor:
        return choices.masked_fill(~self.layout.open_slots(choices), END)


def _column(token: int, like: Tensor) -> Tensor:
    return like.new_full((len(like), 1), token)
