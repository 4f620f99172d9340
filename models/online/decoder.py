"""Generation with three caches: the shallow stack reads every token, the middle stack concepts, the deep stack both.

A row that commits drops its tail; rows commit at different times.
Legend: B batch, P prompt columns, N new tokens, R response columns, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from models.functional.gumbel import sample_categorical
from models.functional.next_token import generated_until_end, read_columns
from models.functional.rows import response_columns
from models.interfaces.decoder import TokenCallback
from models.online.model import OnlineConceptModel
from models.online.row_cache import held_bytes


class OnlineReading:
    """What the rows of a batch have said so far. `read` a prompt once, then `step` token by token."""

    def __init__(self, model: OnlineConceptModel) -> None:
        self.model = model

    @torch.no_grad()
    def read(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits (B, V) of what follows prompts (B, P); valid (B, P) bool is False on padding, left or right."""
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        self.state = self.model.start(len(ids))
        states, _ = self.model.read(ids, valid, state=self.state)
        self.length = valid.sum(1)
        place = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(valid, place, 0).amax(1)
        return self.model.logits(states[torch.arange(len(ids), device=ids.device), last])

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of what follows one more token (B,) of every row."""
        logits = self.model.step(ids, self.length, self.state)
        self.length = self.length + 1
        return logits

    @property
    def concepts(self) -> Tensor:
        """Concepts of each row so far, (B,)."""
        return self.state.concepts

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values that are kept: of tokens, of concepts, and of concepts and tails."""
        return held_bytes(self.state.caches())


class OnlineTexts(NamedTuple):
    """sequences (B, N), filled with the end token behind the first one; concepts (B,) of prompt and text; kv_bytes kept."""

    sequences: Tensor
    concepts: Tensor
    kv_bytes: int


@torch.no_grad()
def generate_online(
    model: OnlineConceptModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: Generator | None = None,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    on_tokens: TokenCallback | None = None,
) -> OnlineTexts:
    """Up to max_new_tokens tokens after prompts (B, P) with attention_mask (B, P); the most probable ones at temperature 0.

    Ends early where every row has said eos_token_id. vocab_size: ids from there on are padding and never said.
    on_tokens: see `Decoder`.
    """
    reading, said = OnlineReading(model.eval()), []
    logits = reading.read(input_ids, None if attention_mask is None else attention_mask.bool())
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while len(said) < max_new_tokens:
        if said:
            logits = reading.step(said[-1])
        said.append(sample_categorical(logits[:, :vocab_size], temperature, generator))
        if on_tokens is not None:
            on_tokens(generated_until_end(said, eos_token_id))
        if eos_token_id is not None:
            ended |= said[-1] == eos_token_id
            if bool(ended.all()):
                break
    return OnlineTexts(generated_until_end(said, eos_token_id), reading.concepts, reading.kv_bytes)


class OnlineConceptDecoder:
    """`generate_online` as a `Decoder`; response_length: R, its steps. kv_bytes: of the last batch, a text."""

    method = "student"
    refines = False

    def __init__(
        self,
        model: OnlineConceptModel,
        response_length: int,
        *,
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> None:
        self.model, self.forwards = model, response_length
        self.temperature, self.vocab_size = temperature, vocab_size
        self.name = "online concepts" if temperature else "online concepts, greedy"
        self.kv_bytes: float | None = None

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        columns = response_columns(rows["response_mask"])
        texts = generate_online(
            self.model,
            rows["input_ids"][:, :-columns],
            read_columns(rows)[:, :-columns],
            max_new_tokens=columns,
            temperature=self.temperature,
            generator=generator,
            vocab_size=self.vocab_size,
            on_tokens=on_tokens,
        )
        self.kv_bytes = texts.kv_bytes / len(texts.sequences)
        return texts.sequences
