"""One causal backbone for text and concepts: base + new embeddings, base + new heads, type embeddings.

Legend: B batch, L columns, D width, V text vocabulary, S slots, W choices of a slot.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from models.backbones.added_layers import added_like
from models.backbones.causal_lm import output_logits, require_known_output
from models.backbones.key_value_cache import cache_argument
from models.functional.attention import padding_mask
from models.functional.precision import at_least_float32
from models.plans.layout import Columns, PlanLayout, joined, types_apart
from models.plans.quantiser import Quantiser, build_quantiser
from models.plans.vocabulary import IMPOSSIBLE, ConceptVocabulary

INITIAL_LOGIT_STD = 4.0  # of a slot's logits before training
EMBEDDING_STD = 5.0  # of new embeddings, in units of the backbone's


class UnifiedModel(nn.Module):
    """backbone: a causal LM of transformers, whole or with adapters; its own tables stay as they are.

    Text's type embedding starts at zero: without concepts the backbone gives the logits that it gave before. New logits and
    new embeddings start large. With small logits the noise of a draw decides the plan; with small embeddings the executor
    cannot tell plans apart, and the posterior gets no gradient. signal_types: types whose codes are values of a signal; a
    quantiser's codes of these have an embedding table.
    """

    def __init__(
        self,
        backbone: nn.Module,
        vocabulary: ConceptVocabulary,
        sampler: str = "gumbel_st",
        signal_types: Collection[str] = (),
    ) -> None:
        super().__init__()
        require_known_output(backbone)
        self.backbone, self.vocabulary, self.layout = backbone, vocabulary, PlanLayout(vocabulary)
        table = backbone.get_input_embeddings().weight
        width, like = table.shape[1], added_like(table)
        self.new_embedding = nn.Embedding(vocabulary.new, width, **like)
        self.new_head = nn.Linear(width, vocabulary.new, bias=False, **like)
        self.type_embedding = nn.Embedding(len(vocabulary.types) + 1, width, **like)
        spread = table.detach().float().std().item()
        nn.init.normal_(self.new_embedding.weight, std=EMBEDDING_STD * spread)
        nn.init.normal_(self.new_head.weight, std=INITIAL_LOGIT_STD / width**0.5)
        nn.init.normal_(self.type_embedding.weight, std=spread)
        nn.init.zeros_(self.type_embedding.weight[0])
        self.quantiser: Quantiser | None = build_quantiser(
            sampler, vocabulary, width, EMBEDDING_STD * spread, signal_types
        )
        # (S, W), among the new ids
        self.register_buffer("choices", vocabulary.choices - vocabulary.base, persistent=False)
        self.register_buffer("possible", vocabulary.possible, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone's hidden states; what is added to it is at least float32."""
        return self.backbone.get_input_embeddings().weight.dtype

    # -- in -----------------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, type_ids: Tensor) -> Tensor:
        """Embeddings (B, L, D) of text and concepts."""
        base = self.vocabulary.base
        is_new = (ids >= base).unsqueeze(-1)
        text = self.backbone.get_input_embeddings()(ids.clamp(max=base - 1))
        new = nn.functional.embedding((ids - base).clamp(min=0), self.new_table())
        return torch.where(is_new, new, text) + self.type_embedding(type_ids)

    def new_table(self) -> Tensor:
        """Embeddings (new ids, D) without their types'; those of codes come from the quantiser where there is one."""
        if self.quantiser is None:
            return self.new_embedding.weight
        own = self.quantiser.embeddings()
        return torch.cat([self.new_embedding.weight[: -len(own)], own])

    def choice_embeddings(self, slots: list[int]) -> Tensor:
        """Embeddings (n, W, D) of the choices of these slots, without their types'."""
        return self.new_table()[self.choices[slots]]

    def states(
        self,
        embeds: Tensor,
        columns: Columns,
        cache: DynamicCache | None = None,
        *,
        apart: bool = False,
        bidirectional: bool = False,
    ) -> Tensor:
        """Hidden states (B, L, D), at least float32, of the last L columns, after the last norm.

        columns: all that are read, those in the cache first. apart: types do not attend to each other. bidirectional: every
        column sees every other one, without a cache.
        """
        new = embeds.shape[1]
        mask = columns.mask.long()
        if apart:
            mask = types_apart(columns, new)
        elif bidirectional:
            mask = padding_mask(columns.mask)
        # always pass a mask: without one transformers takes positions that start again for another document
        states = self.backbone.get_decoder()(
            inputs_embeds=embeds.to(self.dtype),
            attention_mask=mask,
            position_ids=columns.position_ids[:, -new:],
            **cache_argument(cache),
            use_cache=cache is not None,
        ).last_hidden_state
        return at_least_float32(states)

    # -- out ----------------------------------------------------------------------------------------------------------

    def text_logits(self, states: Tensor) -> Tensor:
        """Logits (..., V) over the base vocabulary: no concept among them."""
        return output_logits(self.backbone, states.to(self.dtype))

    def choice_logits(self, states: Tensor, slots: list[int] | None = None) -> Tensor:
        """Logits (B, n, W), at least float32, of these slots or all, from the states (B, n, D) before them."""
        own = slice(None) if slots is None else slots
        heads = at_least_float32(self.new_head.weight[self.choices[own]])
        logits = torch.einsum("bsd,swd->bsw", states, heads)
        return at_least_float32(logits).masked_fill(~self.possible[own], IMPOSSIBLE)


class Reading:
    """Columns that were read so far, as a key-value cache that carries gradients; each `read` adds columns."""

    def __init__(self, model: UnifiedModel, apart: bool = False) -> None:
        self.model, self.apart, self.cache = model, apart, DynamicCache()
        self.columns: Columns | None = None

    def read(self, embeds: Tensor, columns: Columns) -> Tensor:
        """Hidden states (B, L, D) of the new columns."""
        self.columns = columns if self.columns is None else joined(self.columns, columns)
        return self.model.states(embeds, self.columns, self.cache, apart=self.apart)

    def repeat(self, count: int) -> None:
        """Repeat every row `count` times, the copies of a row one after the other."""
        assert self.columns is not None
        self.cache.batch_repeat_interleave(count)
        self.columns = Columns(*(field.repeat_interleave(count, 0) for field in self.columns))
