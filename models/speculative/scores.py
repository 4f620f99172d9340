"""A Hugging Face causal LM as the scores that q* decoding calls.

Legend: B batch, L columns of the buffer, W columns that are read, V vocabulary, F numbers of all chosen layers together.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from models.backbones.abilities import context_of
from models.backbones.causal_lm import chosen_states
from models.functional.errors import UsageError
from models.functional.precision import at_least_float32


class CausalScores:
    """(ids (B, L) right-padded, lengths (B,), count) -> log p (B, count, V) of positions lengths, lengths + 1, ...

    Every call reads whole prefixes, without a key-value cache. A causal model does not see what is behind a position, so
    padding needs no mask.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int | None = None) -> None:
        """vocab_size: ids from there on are padding of the output layer and never generated."""
        self.model, self.vocab_size = model.eval(), vocab_size
        self.context = context_of(model)
        self.layers: tuple[int, ...] = ()
        self._read: tuple[Tensor, Tensor] | None = None  # tokens (B, W) of the last call, and their states (B, W, F)

    def keep_states(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)

    def keep_rows(self, stay: Tensor) -> None:
        if self._read is not None:
            self._read = self._read[0][stay], self._read[1][stay]

    @torch.no_grad()
    def __call__(self, ids: Tensor, lengths: Tensor, count: int) -> Tensor:
        width = int(lengths.max()) + count - 1
        out = self.model(input_ids=ids[:, :width], output_hidden_states=bool(self.layers))
        if self.layers:
            self._read = ids[:, :width].clone(), chosen_states(out, self.layers)
        return log_probabilities_from(out.logits[..., : self.vocab_size], lengths - 1, count)  # logits (B, W, V)

    def states_before(self, ids: Tensor, ends: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """See `StateScores`; of the last call alone."""
        if self._read is None:
            raise ValueError("no states have been kept: call keep_states, and then the scores")
        tokens, states = self._read
        width = tokens.shape[1]
        place = window_positions(ends, window)
        read = (place >= 0) & (place < width)
        place = place.clamp(0, width - 1)
        read &= ids.gather(1, place) == tokens.gather(1, place)
        return states.gather(1, place.unsqueeze(-1).expand(-1, -1, states.shape[-1])), read


def window_positions(ends: Tensor, window: int) -> Tensor:
    """The positions ends - window, ..., ends - 1, (B, window), of ends (B,); those before a text are negative."""
    return ends.unsqueeze(-1) - window + torch.arange(window, device=ends.device)


def log_probabilities_from(logits: Tensor, first: Tensor, count: int) -> Tensor:
    """log p (B, count, V) of `count` columns of logits (B, W, V) from column first (B,) on, in float32 at least."""
    columns = first.unsqueeze(-1) + torch.arange(count, device=logits.device)
    chosen = logits.gather(1, columns.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
    return at_least_float32(chosen).log_softmax(-1)


def require_same_vocabulary(theta: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> int:
    """The size of the vocabulary of two tokenizers. Raises UsageError, naming both and a difference, where they have two.

    q* multiplies the probabilities of the same token, so every id must stand for the same token in both.
    """
    ours, theirs = theta.get_vocab(), target.get_vocab()
    if ours == theirs:
        return max(ours.values()) + 1
    in_order = sorted(ours, key=ours.get)
    token = next((token for token in in_order if theirs.get(token) != ours[token]), None)
    token = next(iter(theirs.keys() - ours.keys())) if token is None else token
    names = [tokenizer.name_or_path or type(tokenizer).__name__ for tokenizer in (theta, target)]
    raise UsageError(
        f"{names[0]} and {names[1]} have different vocabularies: {token!r} is {ours.get(token)} in one and {theirs.get(token)} "
        "in the other; q* needs two models of one vocabulary, such as two of the same family"
    )


def require_one_vocabulary(theta: str | Path | None, target: str | Path | None) -> None:
    """Raise UsageError unless the tokenizers in the folders of both models have one vocabulary; a folder may have none."""
    tokenizers = [_tokenizer_of(path) for path in (theta, target)]
    if None not in tokenizers:
        require_same_vocabulary(*tokenizers)


def _tokenizer_of(path: str | Path | None) -> PreTrainedTokenizerBase | None:
    if path is None or (Path(path).is_dir() and not Path(path, "tokenizer_config.json").is_file()):
        return None
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
