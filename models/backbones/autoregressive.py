"""Generation from left to right with a key-value cache: one forward pass for each token of the response.

Legend: B batch, P prompt columns, R response columns, V vocabulary.
"""

from typing import Any

import torch
from torch import Generator, Tensor, nn

from models.backbones.key_value_cache import cache_argument, cache_of
from models.functional.attention import positions_from_mask
from models.functional.gumbel import sample_categorical
from models.functional.next_token import EndIds, are_ends, generated_until_end, prefix_mask, read_columns, until_end
from models.functional.rows import response_columns
from models.interfaces.decoder import StopRule, TokenCallback
from models.interfaces.masked_sampling import temperature_name


@torch.no_grad()
def generate_autoregressive(
    model: nn.Module,
    rows: dict[str, Tensor],
    generator: Generator,
    *,
    temperature: float = 1.0,
    whole_prompt: bool = False,
    vocab_size: int | None = None,
    end_ids: EndIds = None,
    stop: StopRule | None = None,
    on_tokens: TokenCallback | None = None,
) -> Tensor:
    """Responses (B, R), each token a draw from softmax(logits / temperature), the most probable one at temperature 0.

    whole_prompt: attention among prompt tokens is bidirectional, as a prefix language model was trained.
    vocab_size: ids from there on are padding of the output layer and never generated. end_ids: a row ends with the first of
    them that it generates, and the generation with its last row; none leaves what the model generates there. The first of
    end_ids fills the columns beyond. stop: further texts that have ended; their rows are not filled.
    on_tokens: see `Decoder`.
    """
    columns = response_columns(rows["response_mask"])
    seen = read_columns(rows)
    seen, positions = seen[:, :-columns], positions_from_mask(seen)
    # 1. the prompt, once
    read = {"input_ids": rows["input_ids"][:, :-columns], "position_ids": positions[:, :-columns]}
    mask = prefix_mask(seen, seen.shape[1], next(model.parameters()).dtype) if whole_prompt else seen.long()
    out = model(**read, attention_mask=mask, use_cache=True, logits_to_keep=1)
    response: list[Tensor] = []
    ended = torch.zeros(len(seen), dtype=torch.bool, device=seen.device)
    for column in range(columns):
        # 2. a token from what has been read so far
        response.append(sample_categorical(out.logits[:, -1, :vocab_size], temperature, generator))
        if on_tokens is not None:
            on_tokens(generated_until_end(response, end_ids))
        ended |= are_ends(response[-1], end_ids)
        if stop is not None:
            ended |= stop(torch.stack(response, -1))
        if column + 1 == columns or bool(ended.all()):
            break
        # 3. read it: its keys and values join the cache
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], -1)
        position = positions[:, column - columns, None]
        out = model(
            input_ids=response[-1].unsqueeze(-1),
            attention_mask=seen.long(),
            position_ids=position,
            **cache_argument(cache_of(out)),
            use_cache=True,
        )
    return generated_until_end(response, end_ids, columns)


class AutoregressiveDecoder:
    """`generate_autoregressive` of one model, as a `Decoder`; response_length: R, the most forward passes.

    forward_passes: of each text of the last batch, (B,), where texts end with one of end_ids.
    """

    method = "teacher"
    refines = False

    def __init__(
        self,
        model: nn.Module,
        response_length: int,
        *,
        temperature: float = 1.0,
        whole_prompt: bool = False,
        vocab_size: int | None = None,
        end_ids: EndIds = None,
        stop: StopRule | None = None,
    ) -> None:
        self.model, self.forwards = model, response_length
        self.options: dict[str, Any] = {
            "temperature": temperature, "whole_prompt": whole_prompt, "vocab_size": vocab_size, "end_ids": end_ids,
            "stop": stop,
        }  # fmt: skip
        self.name = "autoregressive" if temperature == 1 else f"autoregressive, {temperature_name(temperature)}"
        self.forward_passes: Tensor | None = None

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        found = generate_autoregressive(self.model, rows, generator, on_tokens=on_tokens, **self.options)
        if self.options["end_ids"] is not None:
            self.forward_passes = until_end(found, self.options["end_ids"]).sum(-1)
        return found
