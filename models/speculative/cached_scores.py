"""A Hugging Face causal LM as the scores that q* decoding asks for, with a key-value cache that survives rejections.

Rows of a batch keep different numbers of drafted tokens. A rejected token stays in the cache as a hole: its slot is masked,
the tokens that replace it are appended behind, and position_ids say where they stand. A cached call and one that reads whole
prefixes give the same log-probabilities.
Legend: B batch, L columns of the buffer, S cache slots, W tokens fed in one forward, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from models.backbones.key_value_cache import cache_argument
from models.functional.errors import UsageError
from models.speculative.scores import context_of, log_probabilities_from

# holes are squeezed out once the cache is this many times as long as its longest row
MOST_WASTE = 1.5
# no key-value cache that is handed in, or distances counted in slots
WITHOUT_PLACES = ("mpt", "rwkv", "openai-gpt", "xlnet")


class CachedScores:
    """(ids (B, L) right-padded, lengths (B,), count) -> log p (B, count, V) of the tokens at places lengths, lengths + 1, ...

    What is cached is found by comparing tokens, so a caller may change its mind about any of them. It belongs to the weights
    it was made with: begin a new one after they change.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int | None = None) -> None:
        """vocab_size: ids from there on are padding of the output layer and never said.

        Raises UsageError for a model that would count holes (attention with a window, or with places of its own counting) or
        that keeps its past elsewhere.
        """
        _require_places(model.config.get_text_config())
        self.model, self.vocab_size = model.eval(), vocab_size
        self.context = context_of(model)
        self._begin(torch.empty(0, 0, dtype=torch.long))

    def _begin(self, ids: Tensor) -> None:
        """An empty cache for the rows of ids (B, L)."""
        self.cache = DynamicCache()
        # (B, S): what each slot holds, where that stands, and whether it is no hole
        self.tokens = self.places = ids.new_zeros(len(ids), 0)
        self.real = self.tokens.bool()

    def keep_rows(self, stay: Tensor) -> None:
        """The next batch is the last one without the rows that are False in stay (B,)."""
        if len(stay) != len(self.tokens):
            return
        self._each_layer(lambda states: states[stay])
        self.tokens, self.places, self.real = (part[stay] for part in (self.tokens, self.places, self.real))

    @torch.no_grad()
    def __call__(self, ids: Tensor, lengths: Tensor, count: int) -> Tensor:
        if len(ids) != len(self.tokens):
            self._begin(ids)
        # 1. how much of each row is cached, and holes where it is not
        held = self._held(ids, lengths)
        self.real = self.real & (self.places < held.unsqueeze(-1))
        self._drop_holes()
        # 2. the rest of every row, padded to one width
        end = lengths + count - 1
        width = int((end - held).max())
        place = held.unsqueeze(-1) + torch.arange(width, device=ids.device)  # (B, W)
        real = place < end.unsqueeze(-1)
        place = torch.minimum(place, end.unsqueeze(-1) - 1)
        fed = ids.gather(1, place)
        self.tokens, self.places = torch.cat([self.tokens, fed], 1), torch.cat([self.places, place], 1)
        self.real = torch.cat([self.real, real], 1)
        # 3. one forward; only the columns that somebody asked for go through the output layer
        first = int((end - held).min()) - count
        logits = self.model(
            input_ids=fed,
            attention_mask=None if bool(self.real.all()) else self.real.long(),
            position_ids=place,
            **cache_argument(self.cache),
            use_cache=True,
            logits_to_keep=width - first,
        ).logits[..., : self.vocab_size]
        return log_probabilities_from(logits, end - held - count - first, count)

    def _held(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Tokens of each row that the cache holds, from its beginning, (B,); the last one before `lengths` is always fed."""
        seen = ids.gather(1, self.places.clamp(max=ids.shape[1] - 1))
        wrong = self.real & ((seen != self.tokens) | (self.places >= ids.shape[1]))
        first_wrong = (
            torch.where(wrong, self.places, ids.shape[1]).amin(-1) if wrong.shape[1] else torch.zeros_like(lengths)
        )
        return torch.minimum(torch.minimum(self.real.sum(-1), first_wrong), lengths - 1)

    def _drop_holes(self) -> None:
        """Cut what is a hole in every row at the end, and squeeze all holes out where there are too many."""
        slots, longest = self.real.shape[1], int(self.real.sum(-1).max()) if self.real.numel() else 0
        used = self.real.any(0).nonzero()
        last = int(used.max()) + 1 if len(used) else 0
        if last > MOST_WASTE * longest:
            order = (~self.real).long().argsort(dim=-1, stable=True)[:, :longest]
            pick = order[:, None, :, None]
            self._each_layer(lambda states: states.gather(2, pick.expand(-1, states.shape[1], -1, states.shape[3])))
            self.tokens, self.places, self.real = (
                part.gather(1, order) for part in (self.tokens, self.places, self.real)
            )
        elif last < slots:
            self._each_layer(lambda states: states[:, :, :last])
            self.tokens, self.places, self.real = (part[:, :last] for part in (self.tokens, self.places, self.real))

    def _each_layer(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)


def _require_places(config: PreTrainedConfig) -> None:
    """Raise UsageError unless every layer looks back without limit and takes a token's place from position_ids."""
    if config.model_type in WITHOUT_PLACES:
        raise UsageError(f"{config.model_type} cannot be told where a token stands or what to keep: type cache=false")
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or [])
    if not kinds and getattr(config, "sliding_window", None) is not None:
        kinds = {"sliding_attention"}
    if limited := kinds - {"full_attention", "global"}:
        raise UsageError(
            f"{config.model_type} has layers of {', '.join(sorted(limited))}; rejected tokens leave holes in the cache "
            "that such layers would count: type cache=false"
        )
