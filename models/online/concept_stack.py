"""Shallow layers over every position, middle layers over concepts alone, deep layers over concepts and tails.

The middle is a `LayerStack`, or again a `ConceptStack`: a second level of concepts. Terms: see `OnlineModelOptions`.
Legend: B batch, T positions, M packed concepts, n rows of a step, D width.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from models.backbones.added_layers import AddedLinear
from models.functional.commit_gates import concept_visibility, mix_slots, smooth_concepts, visibility
from models.functional.commits import (
    Packing,
    deep_mask,
    document_begins,
    latest,
    may_be_seen,
    pack_commits,
    tail_means,
    take,
)
from models.functional.errors import UsageError
from models.online.attention import Visible, concepts_first, deep_block_mask
from models.online.codes import Coded, build_codes
from models.online.growth import ReadOut, build_router
from models.online.layer_stack import LayerStack
from models.online.options import OnlineModelOptions
from models.online.router import RouterState, Routing
from models.online.row_cache import RowCache
from models.online.stack_state import StackState


class CompressionSettings(NamedTuple):
    """How strongly a text is compressed in one forward pass; in training these values are annealed over the steps.

    compression: positions a concept, at every level. quantisation: 0 the middle layers read hidden states, 1 codes.
    temperature: of the relaxed codes. noise: scale of the Gumbel noise of codes and commits, from `generator`; 0 is none.
    gated: whether gate `visibility` computes its gradient, for which every layer reads every position.
    """

    compression: float
    quantisation: float
    temperature: float = 1.0
    noise: float = 0.0
    generator: Generator | None = None
    gated: bool = True


class Level(NamedTuple):
    """Result of one level. real (B, M): which packed concepts are none of the padding.

    hidden (B, T, D): the states that its router reads.
    """

    routing: Routing
    coded: Coded
    real: Tensor
    hidden: Tensor


class ConceptStack(nn.Module):
    """split: [shallow, middle, deep] layers of `decoder` from `first` on; middle may be such a list again.

    embedding_std: root mean square of fresh embeddings of codes. read_out: logits of hidden states, for growth `entropy`.
    """

    def __init__(
        self,
        decoder: nn.Module,
        split: list,
        options: OnlineModelOptions,
        *,
        embedding_std: float = 1.0,
        read_out: ReadOut | None = None,
        first: int = 0,
        **like,
    ) -> None:
        super().__init__()
        shallow, middle, deep = split
        nested = isinstance(middle, list)
        if options.gate == "visibility" and nested:
            raise UsageError("module.gate=visibility is of one level; type module.levels=1, or module.gate=slot")
        width = decoder.embed_tokens.weight.shape[1]
        inner = {"embedding_std": embedding_std, "first": first + shallow, **like}
        self.inner = ConceptStack(decoder, middle, options, **inner) if nested else None
        size: int = middle if self.inner is None else self.inner.size
        self.size: int = shallow + size + deep
        self.gate, self.attention = options.gate, options.attention
        self.shallow = LayerStack(decoder, first, first + shallow)
        self.middle = None if nested else LayerStack(decoder, first + shallow, first + shallow + size)
        self.deep = LayerStack(decoder, first + shallow + size, first + self.size)
        # the other layers over every position as well, where the router reads the whole model's states
        reads_whole = options.router_reads == "whole"
        self.rest = LayerStack(decoder, first + shallow, first + self.size) if reads_whole else None
        self.codes = build_codes(options.sampler, width, options.codes, embedding_std, **like)
        self.router = build_router(options, width, self.codes, read_out, **like)
        # linear maps around the middle layers: of a NULL's own state, of the concept before it, of the mean of a tail.
        # They start at 0, so that a fresh model differs from its backbone as little as it can
        self.bridge = AddedLinear(width, width, bias=False, **like)
        self.carry = AddedLinear(width, width, bias=False, **like) if options.carry else None
        self.pool = AddedLinear(width, width, bias=False, **like) if options.pool else None
        for new in (self.bridge, self.carry, self.pool):
            if new is not None:
                nn.init.zeros_(new.weight)

    # -- a whole text -------------------------------------------------------------------------------------------------

    def read(
        self,
        states: Tensor,
        positions: Tensor,
        valid: Tensor,
        settings: CompressionSettings,
        state: StackState | None = None,
        documents: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, list[Level]]:
        """(B, T, D), (B, T), valid (B, T) bool -> states (B, T, D) and the result of each level, the outermost first.

        state: caches to fill. documents (B, T): of rows with several documents, which never see each other. tokens (B, T):
        None where positions are no tokens.
        """
        # 1. shallow layers over every position
        hidden = self.shallow.read(states, positions, valid, state and state.shallow, documents)
        # 2. commits: the positions that become concepts, packed to the left
        routed = hidden
        if self.rest is not None and settings.compression > 1:
            routed = self.rest.read(hidden, positions, valid, state and state.rest, documents)
        routing, after = self._route(routed, valid, state and state.router, settings, documents, tokens)
        packing = pack_commits(routing.commit)
        owners = None if documents is None else take(documents, packing.indices)
        tails = tail_means(self.codes.normed(hidden), routing.commit, valid, documents)
        if self.gate == "visibility" and settings.gated and routing.probability.requires_grad and state is None:
            out, coded = self._dense(hidden, tails, positions, routing, packing, valid, settings, documents)
            inner: list[Level] = []
        else:
            # 3. middle layers over the concepts alone
            chosen = self._pooled(take(hidden, packing.indices), take(tails, packing.indices))
            probability = torch.where(packing.real, routing.probability.gather(1, packing.indices), 1.0)
            coded = self._code(chosen, probability, settings)
            packed = take(positions, packing.indices), packing.real, settings, state
            concepts, inner = self._middle(coded.embeds, *packed, owners)
            if self.gate == "smooth":
                if owners is not None:
                    probability = probability.masked_fill(document_begins(owners), 1.0)
                concepts = smooth_concepts(concepts, probability)
            # 4. deep layers: every position attends to the concepts before it and to its own tail
            slots = self._slots(hidden, concepts, routing, packing, documents, owners)
            out = self._deep(slots, positions, routing.commit, packing, valid, state and state.deep, documents)
        # 5. what later steps need
        if state is not None:
            count = packing.segment[:, -1]
            state.deep.keep(routing.commit | (valid & (packing.segment == count.unsqueeze(1))))
            state.router, state.concepts = after, count
            state.last, state.tail = latest(concepts, count.unsqueeze(1)).squeeze(1), tails[:, -1]
        return out, [Level(routing, coded, packing.real, routed), *inner]

    def _route(
        self,
        hidden: Tensor,
        valid: Tensor,
        state: RouterState | None,
        settings: CompressionSettings,
        documents: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> tuple[Routing, RouterState]:
        state = self.router.start(len(hidden), hidden.device, hidden.dtype) if state is None else state
        more = {"tokens": tokens, "noise": settings.noise, "generator": settings.generator}
        return self.router(hidden, valid, state, self.codes, documents, compression=settings.compression, **more)

    def _code(self, chosen: Tensor, probability: Tensor, settings: CompressionSettings) -> Coded:
        return self.codes(
            chosen,
            probability,
            quantisation=settings.quantisation,
            temperature=settings.temperature,
            noise=settings.noise,
            generator=settings.generator,
            null_mass=self.gate == "mass",
        )

    def _middle(
        self,
        concepts: Tensor,
        positions: Tensor,
        real: Tensor,
        settings: CompressionSettings,
        state: StackState | None,
        owners: Tensor | None,
    ) -> tuple[Tensor, list[Level]]:
        if self.inner is not None:
            return self.inner.read(concepts, positions, real, settings, state and state.middle, owners)
        assert self.middle is not None
        return self.middle.read(concepts, positions, real, state and state.middle, owners), []

    def _slots(
        self,
        hidden: Tensor,
        concepts: Tensor,
        routing: Routing,
        packing: Packing,
        documents: Tensor | None,
        owners: Tensor | None,
    ) -> Tensor:
        """Deep inputs (B, T, D): of a commit its concept, of a NULL its shallow state and the concept before it."""
        commit = routing.commit
        token = self._bridged(hidden, latest(concepts, packing.segment - commit.long(), documents, owners))
        last = latest(concepts, packing.segment, documents, owners)
        if self.gate == "slot":
            return mix_slots(commit, routing.probability, last, token)
        return torch.where(commit.unsqueeze(-1), last, token)

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
        tails: Tensor,
        positions: Tensor,
        routing: Routing,
        packing: Packing,
        valid: Tensor,
        settings: CompressionSettings,
        documents: Tensor | None,
    ) -> tuple[Tensor, Coded]:
        """Steps 3 and 4 for gate `visibility`: the same values, with every position in every layer and soft attention masks.

        A NULL is also computed as a concept, and a concept as a NULL. So each decision gets a gradient.
        """
        assert self.middle is not None
        commit, probability, may = routing.commit, routing.probability, may_be_seen(valid, documents)
        coded = self._code(self._pooled(hidden, tails[:, :-1]), probability, settings)
        concepts = self.middle.run(coded.embeds, positions, Visible(concept_visibility(commit, probability, may)))
        owners = None if documents is None else take(documents, packing.indices)
        before = latest(take(concepts, packing.indices), packing.segment - commit.long(), documents, owners)
        slots = mix_slots(commit, probability, concepts, self._bridged(hidden, before))
        seen = deep_mask(commit, packing.segment, valid, documents)
        out = self.deep.run(slots, positions, Visible(visibility(seen, probability, may)))
        return out, Coded._make(part if part is None else take(part, packing.indices) for part in coded)

    def _pooled(self, hidden: Tensor, tails: Tensor) -> Tensor:
        """Input of a concept. tails: mean hidden state of the NULLs before it; both (B, M, D)."""
        return hidden if self.pool is None else hidden + self.pool(tails)

    def _bridged(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Deep input of a NULL. before: the concept before it, 0 where there is none; all (B, T, D)."""
        token = hidden + self.bridge(self.codes.normed(hidden))
        return token if self.carry is None else token + self.carry(self.codes.normed(before))

    # -- one position a row -------------------------------------------------------------------------------------------

    def step(
        self,
        states: Tensor,
        positions: Tensor,
        state: StackState,
        rows: Tensor,
        settings: CompressionSettings,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """The next position (n, 1, D) of rows (n,). Every row decides for itself whether to commit. tokens (n, 1)."""
        # 1. shallow layers of every row
        hidden = self.shallow.step(states, positions, state.shallow, rows)
        # 2. which of them commit
        always = torch.ones_like(positions, dtype=torch.bool)
        held, tails = state.router.rows(rows), state.tail[rows].unsqueeze(1)
        routed = hidden
        if self.rest is not None and settings.compression > 1:
            routed = self.rest.step(hidden, positions, state.rest, rows)
        routing, after = self._route(routed, always, held, settings, tokens=tokens)
        state.router.put(rows, after)
        slots, commit = self._bridged(hidden, state.last[rows].unsqueeze(1)), routing.commit[:, 0]
        # 3. middle layers of these rows alone; their tails leave the deep cache
        if bool(commit.any()):
            committing, probability = rows[commit], routing.probability[commit]
            embeds = self._code(self._pooled(hidden[commit], tails[commit]), probability, settings).embeds
            if self.inner is not None:
                concepts = self.inner.step(embeds, positions[commit], state.middle, committing, settings)
            else:
                assert self.middle is not None
                concepts = self.middle.step(embeds, positions[commit], state.middle, committing)
            if self.gate == "smooth":
                first = (state.concepts[committing] == 0).view(-1, 1)
                before = torch.where(first, concepts[:, 0], state.last[committing])
                concepts = smooth_concepts(concepts, probability, before)
            state.last[committing] = concepts[:, 0]
            slots = slots.clone()
            slots[commit] = concepts
            state.deep.cut(committing, state.concepts[committing])
            state.concepts[committing] += 1
        count = held.since.view(-1, 1, 1)
        tails = (tails * count + self.codes.normed(hidden)) / (count + 1)
        state.tail[rows] = tails[:, 0] * ~commit.unsqueeze(1)
        # 4. deep layers of every row, over its concepts and its tail
        return self.deep.step(slots, positions, state.deep, rows)
