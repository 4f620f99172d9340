"""Generation with a key-value cache for each stack.

The shallow layers cache every position, the middle layers concepts, the deep layers concepts and the tail. A row that commits
drops the tail from its deep cache. Rows of a batch commit at different steps.
Legend: B batch, P prompt columns, N new tokens, R response columns, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.functional.gumbel import sample_categorical
from models.functional.next_token import EndIds, are_ends, as_end_ids, generated_until_end, read_columns
from models.functional.rows import response_columns
from models.interfaces.decoder import StopRule, TokenCallback
from models.online.model import OnlineConceptModel
from models.online.row_cache import held_bytes


class IncrementalForward:
    """Incremental forward passes of a batch: `prefill` its prompts once, then `step` one token a row.

    state: caches and router states of the rows so far.
    """

    def __init__(self, model: OnlineConceptModel) -> None:
        self.model = model

    @torch.no_grad()
    def prefill(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits (B, V) of the token after prompts (B, P); valid (B, P) bool is False on padding, left or right."""
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        self.state = self.model.start(len(ids))
        states, _ = self.model.read(ids, valid, state=self.state)
        self.length = valid.sum(1)
        column = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(valid, column, 0).amax(1)
        return self.model.logits(states[torch.arange(len(ids), device=ids.device), last])

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of the token after one more token (B,) of every row."""
        logits = self.model.step(ids, self.length, self.state)
        self.length = self.length + 1
        return logits

    @property
    def concepts(self) -> Tensor:
        """Concepts of each row so far, (B,)."""
        return self.state.concepts

    @property
    def kv_bytes(self) -> int:
        """Bytes of all cached keys and values, of the three stacks together."""
        return held_bytes(self.state.caches())


class OnlineTexts(NamedTuple):
    """sequences (B, N), filled with the end token behind the first one; concepts (B,) of prompt and sequence.

    kv_bytes: size of the caches at the end.
    """

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
    eos_token_id: EndIds = None,
    vocab_size: int | None = None,
    stop: StopRule | None = None,
    on_tokens: TokenCallback | None = None,
) -> OnlineTexts:
    """Up to max_new_tokens tokens after prompts (B, P) with attention_mask (B, P); the most probable ones at temperature 0.

    eos_token_id: one token or several; generation ends early once every row has generated one. vocab_size: larger ids are
    padding and are never generated. stop: further texts that have ended; their rows are not filled.
    on_tokens: see `Decoder`.
    """
    forward, tokens = IncrementalForward(model.eval()), list[Tensor]()
    logits = forward.prefill(input_ids, None if attention_mask is None else attention_mask.bool())
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while len(tokens) < max_new_tokens:
        if tokens:
            logits = forward.step(tokens[-1])
        tokens.append(sample_categorical(logits[:, :vocab_size], temperature, generator))
        if on_tokens is not None:
            on_tokens(generated_until_end(tokens, eos_token_id))
        ended |= are_ends(tokens[-1], eos_token_id)
        if stop is not None:
            ended |= stop(torch.stack(tokens, -1))
        if bool(ended.all()):
            break
    return OnlineTexts(generated_until_end(tokens, eos_token_id), forward.concepts, forward.kv_bytes)


class OnlineConceptDecoder:
    """`generate_online` as a `Decoder`. response_length: R, its number of steps. kv_bytes: per row of the last batch."""

    method = "student"
    refines = False

    def __init__(
        self,
        model: OnlineConceptModel,
        response_length: int,
        *,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        end_ids: EndIds = None,
        stop: StopRule | None = None,
    ) -> None:
        self.model, self.forwards = model, response_length
        self.temperature, self.vocab_size, self.end_ids, self.stop = temperature, vocab_size, end_ids, stop
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
            eos_token_id=self.end_ids,
            vocab_size=self.vocab_size,
            stop=self.stop,
            on_tokens=on_tokens,
        )
        self.kv_bytes = texts.kv_bytes / len(texts.sequences)
        fill = next(iter(as_end_ids(self.end_ids)), 0)
        return F.pad(texts.sequences, (0, columns - texts.sequences.shape[1]), value=fill)
