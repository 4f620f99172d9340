"""A Hugging Face causal LM as the scores that q* decoding calls, with a key-value cache that survives rejections.

Rows of a batch accept different numbers of drafted tokens. The slot of a rejected token stays in the cache and is masked. The
tokens that replace it are appended behind, and position_ids hold their positions. A cached call gives the log-probabilities of
one that reads whole prefixes.
Legend: B batch, L columns of the buffer, S cache slots, W tokens fed in one forward pass, V vocabulary, F numbers of all
chosen layers together.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from models.backbones.abilities import context_of, limited_layers
from models.backbones.causal_lm import chosen_states
from models.backbones.key_value_cache import cache_argument
from models.functional.errors import UsageError
from models.speculative.scores import log_probabilities_from, window_positions

# masked slots are removed once the cache is this many times as long as its longest row
MAX_WASTE = 1.5
# models that take no key-value cache, or count distances in slots
WITHOUT_POSITION_IDS = ("mpt", "rwkv", "openai-gpt", "xlnet")


class CachedScores:
    """(ids (B, L) right-padded, lengths (B,), count) -> log p (B, count, V) of positions lengths, lengths + 1, ...

    What is cached is found by comparing tokens, so a caller may replace any of them. The cache belongs to the weights that it
    was made with: make a new instance after they change.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int | None = None) -> None:
        """vocab_size: ids from there on are padding of the output layer and never generated.

        Raises UsageError for a model that would count masked slots (a sliding window, or positions of its own counting) or
        that takes no key-value cache.
        """
        _require_position_ids(model.config.get_text_config())
        self.model, self.vocab_size = model.eval(), vocab_size
        self.context = context_of(model)
        self.layers: tuple[int, ...] = ()
        self._reset(torch.empty(0, 0, dtype=torch.long))

    def _reset(self, ids: Tensor) -> None:
        """An empty cache for the rows of ids (B, L)."""
        self.cache = DynamicCache()
        # (B, S): the token of each slot, its position, and whether the slot is in use
        self.tokens = self.positions = ids.new_zeros(len(ids), 0)
        self.valid = self.tokens.bool()
        self.states: Tensor | None = None  # (B, S, F): of each slot, where states are kept

    def keep_states(self, layers: Sequence[int]) -> None:
        """See `StateScores`. What is cached without its states is forgotten."""
        self.layers = tuple(layers)
        self._reset(torch.empty(0, 0, dtype=torch.long))

    def states_before(self, ids: Tensor, ends: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """See `StateScores`."""
        if self.states is None:
            raise ValueError("no states have been kept: call keep_states, and then the scores")
        # 1. slots in use, of the tokens that are asked for, inside the window
        column = self.positions - window_positions(ends, 1) + window - 1
        given = ids.gather(1, self.positions.clamp(max=ids.shape[1] - 1))
        wanted = self.valid & (given == self.tokens) & (column >= 0) & (column < window)
        # 2. the slot of each position of the window
        slots = torch.arange(column.shape[1], device=ids.device).expand_as(column)
        slot = torch.full((len(ids), window + 1), -1, device=ids.device)  # the last column takes what is not wanted
        slot = slot.scatter(1, torch.where(wanted, column, window), slots)[:, :window]
        index = slot.clamp(min=0).unsqueeze(-1).expand(-1, -1, self.states.shape[-1])
        return self.states.gather(1, index), slot >= 0

    def keep_rows(self, stay: Tensor) -> None:
        """Remove the rows that are False in stay (B,); the next call is for the others."""
        if len(stay) != len(self.tokens):
            return
        self._each_layer(lambda states: states[stay])
        self._each_part(lambda part: part[stay])

    @torch.no_grad()
    def __call__(self, ids: Tensor, lengths: Tensor, count: int) -> Tensor:
        if len(ids) != len(self.tokens):
            self._reset(ids)
        # 1. how much of each row is cached; the slots behind are masked
        cached = self._cached_lengths(ids, lengths)
        self.valid = self.valid & (self.positions < cached.unsqueeze(-1))
        self._compact()
        # 2. the rest of every row, padded to one width
        end = lengths + count - 1
        width = int((end - cached).max())
        position = cached.unsqueeze(-1) + torch.arange(width, device=ids.device)  # (B, W)
        valid = position < end.unsqueeze(-1)
        position = torch.minimum(position, end.unsqueeze(-1) - 1)
        fed = ids.gather(1, position)
        self.tokens, self.positions = torch.cat([self.tokens, fed], 1), torch.cat([self.positions, position], 1)
        self.valid = torch.cat([self.valid, valid], 1)
        # 3. one forward pass; only the columns that are returned go through the output layer
        first = int((end - cached).min()) - count
        out = self.model(
            input_ids=fed,
            attention_mask=None if bool(self.valid.all()) else self.valid.long(),
            position_ids=position,
            **cache_argument(self.cache),
            use_cache=True,
            logits_to_keep=width - first,
            output_hidden_states=bool(self.layers),
        )
        if self.layers:
            states = chosen_states(out, self.layers)
            self.states = states if self.states is None else torch.cat([self.states, states], 1)
        return log_probabilities_from(out.logits[..., : self.vocab_size], end - cached - count - first, count)

    def _cached_lengths(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """How many first tokens of each row are cached, (B,); the last one before `lengths` is always fed."""
        given = ids.gather(1, self.positions.clamp(max=ids.shape[1] - 1))
        wrong = self.valid & ((given != self.tokens) | (self.positions >= ids.shape[1]))
        first_wrong = (
            torch.where(wrong, self.positions, ids.shape[1]).amin(-1) if wrong.shape[1] else torch.zeros_like(lengths)
        )
        return torch.minimum(torch.minimum(self.valid.sum(-1), first_wrong), lengths - 1)

    def _compact(self) -> None:
        """Cut slots that are masked in every row off the end, and remove all masked slots where there are too many."""
        slots, longest = self.valid.shape[1], int(self.valid.sum(-1).max()) if self.valid.numel() else 0
        used = self.valid.any(0).nonzero()
        last = int(used.max()) + 1 if len(used) else 0
        if last > MAX_WASTE * longest:
            order = (~self.valid).long().argsort(dim=-1, stable=True)[:, :longest]
            pick = order[:, None, :, None]
            self._each_layer(lambda states: states.gather(2, pick.expand(-1, states.shape[1], -1, states.shape[3])))
            self._each_part(
                lambda part: part.gather(1, order if part.ndim == 2 else pick[:, 0].expand(-1, -1, part.shape[-1]))
            )
        elif last < slots:
            self._each_layer(lambda states: states[:, :, :last])
            self._each_part(lambda part: part[:, :last])

    def _each_part(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change what is kept of each slot beside keys and values, (B, S) and (B, S, F)."""
        self.tokens, self.positions, self.valid = map(change, (self.tokens, self.positions, self.valid))
        self.states = None if self.states is None else change(self.states)

    def _each_layer(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)


def _require_position_ids(config: PreTrainedConfig) -> None:
    """Raise UsageError unless every layer looks back without limit and takes positions from position_ids."""
    if config.model_type in WITHOUT_POSITION_IDS:
        raise UsageError(f"{config.model_type} takes no position_ids or no key-value cache: type module.cache=false")
    if limited := limited_layers(config):
        raise UsageError(
            f"{config.model_type} has layers of {', '.join(sorted(limited))}; they would count the masked slots of rejected "
            "tokens in the cache: type module.cache=false"
        )
