"""Shallow layers over every position, middle layers over concepts alone, deep layers over concepts and each tail.

The middle is a `LayerStack`, or again a `ConceptStack`: concepts of concepts.
Legend: B batch, T positions, M packed concepts, n rows of a step, D width.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from models.backbones.row_cache import RowCache
from models.concept.attention import Visible, concepts_first, deep_block_mask
from models.concept.codes import Coded, build_codes
from models.concept.layer_stack import LayerStack
from models.concept.router import ReadOut, RouterState, Routing, build_router
from models.functional.commit_gates import concept_visibility, mix_slots, smooth_concepts, visibility
from models.functional.commits import Packing, deep_mask, document_begins, may_be_seen, pack_commits, take
from models.functional.errors import UsageError, require_choice

GATES = ("slot", "smooth", "mass", "visibility", "none")


class Setting(NamedTuple):
    """How strongly to compress: compression (tokens a concept, of every level), quantisation (0 states, 1 codes).

    temperature and noise (0 none, 1 a full draw) of codes and commits, drawn from `generator`. gated: whether gate
    `visibility` works out its gradient, for which every layer reads every position.
    """

    compression: float
    quantisation: float
    temperature: float = 1.0
    noise: float = 0.0
    generator: Generator | None = None
    gated: bool = True


class Level(NamedTuple):
    """What one level did with a text. hidden (B, T, D): its shallow states."""

    routing: Routing
    coded: Coded
    real: Tensor
    hidden: Tensor


class StackState:
    """What a stack has read of B rows: a cache for each stage, the router's state, commits so far and the last concept."""

    def __init__(self, stack: "ConceptStack", batch: int, device: torch.device) -> None:
        self.shallow, self.deep = RowCache(), RowCache()
        self.middle = RowCache() if stack.inner is None else StackState(stack.inner, batch, device)
        self.router: RouterState = stack.router.start(batch, device)
        self.concepts = torch.zeros(batch, dtype=torch.long, device=device)
        self.smooth: Tensor | None = None

    def caches(self) -> list[RowCache]:
        inner = [self.middle] if isinstance(self.middle, RowCache) else self.middle.caches()
        return [self.shallow, *inner, self.deep]


class ConceptStack(nn.Module):
    """split: [shallow, middle, deep] layers of `decoder` from `first` on; middle may be such a list again.

    gate: how the decision to commit gets a gradient: `slot`, `smooth`, `mass`, `visibility` (commit_gates) or `none`.
    attention: of the deep layers over whole texts, `sdpa` or `flex`.
    """

    def __init__(
        self,
        decoder: nn.Module,
        split: list,
        *,
        growth: str,
        gate: str,
        codes: int,
        most_nulls: int,
        sampler: str = "gumbel_st",
        attention: str = "sdpa",
        loudness: float = 1.0,
        read_out: ReadOut | None = None,
        first: int = 0,
        **like,
    ) -> None:
        super().__init__()
        require_choice("module.gate", gate, GATES)
        shallow, middle, deep = split
        if gate == "visibility" and isinstance(middle, list):
            raise UsageError("module.gate=visibility is of one level; type module.levels=1, or module.gate=slot")
        width = decoder.embed_tokens.weight.shape[1]
        more = {"growth": growth, "gate": gate, "codes": codes, "sampler": sampler, "most_nulls": most_nulls}
        more |= {"attention": attention, "loudness": loudness}
        self.inner = (
            ConceptStack(decoder, middle, **more, first=first + shallow, **like) if isinstance(middle, list) else None
        )
        size = middle if self.inner is None else self.inner.size
        self.size, self.gate, self.attention = shallow + size + deep, gate, attention
        self.shallow = LayerStack(decoder, first, first + shallow)
        self.middle = None if self.inner is not None else LayerStack(decoder, first + shallow, first + shallow + size)
        self.deep = LayerStack(decoder, first + shallow + size, first + self.size)
        self.codes = build_codes(sampler, width, codes, loudness, **like)
        self.router = build_router(growth, width, most_nulls, self.codes, read_out, **like)
        # a tail position skips the middle stack; what it does there instead starts as nothing
        self.bridge = nn.Linear(width, width, bias=False, **like)
        nn.init.zeros_(self.bridge.weight)

    # -- a whole text -------------------------------------------------------------------------------------------------

    def read(
        self,
        states: Tensor,
        positions: Tensor,
        valid: Tensor,
        setting: Setting,
        state: StackState | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, list[Level]]:
        """(B, T, D), (B, T), valid (B, T) bool -> states (B, T, D) and what each level did, the outermost first.

        documents (B, T): where rows have several, nothing of one reaches another.
        """
        # 1. every position
        hidden = self.shallow.read(states, positions, valid, state and state.shallow, documents)
        # 2. which of them become concepts
        routing, after = self._route(hidden, valid, state and state.router, setting, documents)
        packing = pack_commits(routing.commit)
        owners = None if documents is None else take(documents, packing.index)
        if self.gate == "visibility" and setting.gated and routing.probability.requires_grad and state is None:
            out, coded, inner = *self._dense(hidden, positions, routing, packing, valid, setting, documents), []
        else:
            # 3. concepts alone
            chosen = take(hidden, packing.index)
            sure = torch.where(packing.real, routing.probability.gather(1, packing.index), 1.0)
            coded = self._code(chosen, sure, setting)
            packed = take(positions, packing.index), packing.real, setting, state
            concepts, inner = self._middle(coded.embeds, *packed, owners)
            if self.gate == "smooth":
                shares = sure if owners is None else sure.masked_fill(document_begins(owners), 1.0)
                concepts = smooth_concepts(concepts, shares)
            # 4. concepts, and each position's own tail
            behind = packing.segment > 0  # a concept is never seen from before it, nor from another document
            if documents is not None:
                behind = behind & (owners.gather(1, packing.slot) == documents)
            slots = self._slots(hidden, take(concepts, packing.slot) * behind.unsqueeze(-1), routing)
            out = self._deep(slots, positions, routing.commit, packing, valid, state and state.deep, documents)
        if state is not None:
            count = packing.segment[:, -1]
            state.deep.keep(routing.commit | (valid & (packing.segment == count.unsqueeze(1))))
            state.router, state.concepts = after, count
            state.smooth = concepts[torch.arange(len(count), device=count.device), (count - 1).clamp(min=0)]
        return out, [Level(routing, coded, packing.real, hidden), *inner]

    def _route(
        self,
        hidden: Tensor,
        valid: Tensor,
        state: RouterState | None,
        setting: Setting,
        documents: Tensor | None = None,
    ) -> tuple[Routing, RouterState]:
        state = self.router.start(len(hidden), hidden.device) if state is None else state
        draws = {"noise": setting.noise, "generator": setting.generator}
        return self.router(hidden, valid, state, self.codes, documents, compression=setting.compression, **draws)

    def _code(self, chosen: Tensor, sure: Tensor, setting: Setting) -> Coded:
        return self.codes(
            chosen,
            sure,
            quantisation=setting.quantisation,
            temperature=setting.temperature,
            noise=setting.noise,
            generator=setting.generator,
            null_mass=self.gate == "mass",
        )

    def _middle(
        self,
        concepts: Tensor,
        positions: Tensor,
        real: Tensor,
        setting: Setting,
        state: StackState | None,
        owners: Tensor | None,
    ) -> tuple[Tensor, list[Level]]:
        if self.inner is not None:
            return self.inner.read(concepts, positions, real, setting, state and state.middle, owners)
        return self.middle.read(concepts, positions, real, state and state.middle, owners), []

    def _slots(self, hidden: Tensor, last: Tensor, routing: Routing) -> Tensor:
        """What each position gives the deep stack: its concept, or its shallow state; last: the concept at or before it."""
        token = self._bridged(hidden)
        if self.gate == "slot":
            return mix_slots(routing.commit, routing.probability, last, token)
        return torch.where(routing.commit.unsqueeze(-1), last, token)

    def _deep(
        self,
        slots: Tensor,
        positions: Tensor,
        commit: Tensor,
        packing: Packing,
        valid: Tensor,
        cache: RowCache | None,
        documents: Tensor | None,
    ) -> Tensor:
        whole = commit, packing.segment, valid, documents
        if bool(commit.all()) and documents is None:
            return self.deep.run(slots, positions, None, cache)
        if self.attention == "sdpa" or cache is not None:
            return self.deep.run(slots, positions, deep_mask(*whole), cache)
        order = concepts_first(commit)
        mask = deep_block_mask(commit, packing, valid, order, documents)
        return take(self.deep.run(take(slots, order), take(positions, order), mask), order.argsort(1))

    def _dense(
        self,
        hidden: Tensor,
        positions: Tensor,
        routing: Routing,
        packing: Packing,
        valid: Tensor,
        setting: Setting,
        documents: Tensor | None,
    ) -> tuple[Tensor, Coded]:
        """The same values with every position as a concept of its own, which is seen or not: what a NULL would have been
        as a concept, and a concept as a NULL, gives each decision its gradient.
        """
        commit, probability, may = routing.commit, routing.probability, may_be_seen(valid, documents)
        coded = self._code(hidden, probability, setting)
        concepts = self.middle.run(coded.embeds, positions, Visible(concept_visibility(commit, probability, may)))
        slots = mix_slots(commit, probability, concepts, self._bridged(hidden))
        seen = deep_mask(commit, packing.segment, valid, documents)
        out = self.deep.run(slots, positions, Visible(visibility(seen, probability, may)))
        return out, Coded(*(part if part is None else take(part, packing.index) for part in coded))

    def _bridged(self, hidden: Tensor) -> Tensor:
        return hidden + self.bridge(self.codes.normed(hidden))

    # -- one position a row -------------------------------------------------------------------------------------------

    def step(self, states: Tensor, positions: Tensor, state: StackState, rows: Tensor, setting: Setting) -> Tensor:
        """The next position (n, 1, D) of rows (n,); each row commits or not by itself."""
        # 1. every row
        hidden = self.shallow.step(states, positions, state.shallow, rows)
        # 2. which of them commit
        always = torch.ones_like(positions, dtype=torch.bool)
        routing, after = self._route(hidden, always, state.router.rows(rows), setting)
        state.router.put(rows, after)
        slots, commit = self._bridged(hidden), routing.commit[:, 0]
        # 3. those alone: the middle stack, and the tail is dropped
        if bool(commit.any()):
            theirs, sure = rows[commit], routing.probability[commit]
            embeds = self._code(hidden[commit], sure, setting).embeds
            if self.inner is None:
                concepts = self.middle.step(embeds, positions[commit], state.middle, theirs)
            else:
                concepts = self.inner.step(embeds, positions[commit], state.middle, theirs, setting)
            if self.gate == "smooth":
                first = (state.concepts[theirs] == 0).view(-1, 1)
                before = torch.where(first, concepts[:, 0], state.smooth[theirs])
                concepts = smooth_concepts(concepts, sure, before)
                state.smooth[theirs] = concepts[:, 0]
            slots = slots.clone()
            slots[commit] = concepts
            state.deep.cut(theirs, state.concepts[theirs])
            state.concepts[theirs] += 1
        # 4. every row, over its concepts and its tail
        return self.deep.step(slots, positions, state.deep, rows)
