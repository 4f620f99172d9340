"""What every datamodule hands to every method: prompt columns on the left, response columns on the right.

Legend: B batch, P prompt columns, R response columns, L = P + R.

    input_ids      (B, L) int64  prompt left-padded to P columns, response padded with end-of-text to R columns
    attention_mask (B, L) bool   False only on the prompt's left padding (a response's trailing end-of-text is real text)
    response_mask  (B, L) bool   True on the R response columns
    completion_mask (B, L) bool  True on the response up to its first end token, which alone causal models are then scored on;
                                 only where a corpus leaves end padding out of the loss (data.end_padding=false)
    signal/<name>  (B,)   int64  known property of each row's text, of corpora with signals (`signal_sizes`)

Because the response always fills the last R columns, `input_ids[:, -R:]` is the response of every row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.functional.errors import UsageError


def pack_prompt_response(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    prompt_length: int,
    response_length: int,
    pad_id: int,
    eos_id: int,
) -> dict[str, Tensor]:
    """Lay token lists out as the batch described above; every list must already fit its columns.

    Raises UsageError, naming the first row and the option to change, when a prompt or a response is too long.
    """
    rows, columns = len(prompts), prompt_length + response_length
    input_ids = torch.full((rows, columns), pad_id, dtype=torch.long)
    attention_mask = torch.zeros(rows, columns, dtype=torch.bool)
    input_ids[:, prompt_length:] = eos_id
    attention_mask[:, prompt_length:] = True
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        for what, ids, limit in (("prompt", prompt, prompt_length), ("response", response, response_length)):
            if len(ids) > limit:
                raise UsageError(
                    f"{what} {row} has {len(ids)} tokens, but data.{what}_length={limit}; "
                    f"type data.{what}_length={len(ids)} or shorten it"
                )
        start = prompt_length - len(prompt)
        input_ids[row, start:prompt_length] = torch.tensor(prompt, dtype=torch.long)
        attention_mask[row, start:prompt_length] = True
        input_ids[row, prompt_length : prompt_length + len(response)] = torch.tensor(response, dtype=torch.long)
    response_mask = torch.zeros(rows, columns, dtype=torch.bool)
    response_mask[:, prompt_length:] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}


class TensorRows(Dataset):
    """Rows of equally long tensors, fetched a whole batch at a time (one index per column, no Python loop over rows)."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of different lengths: {lengths}")
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch, and in `row` (B,) the number of each of its rows, under which values can be stored for it."""
        chosen = torch.as_tensor(indices)
        return {name: column[chosen] for name, column in self.columns.items()} | {"row": chosen}


def trim_columns(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without the columns that are padding in all of its rows.

    The first ones are those before every prompt; the last ones, where rows have a `completion_mask`, those after every end.
    The response columns are then fewer.
    """
    first = int(batch["attention_mask"].any(0).long().argmax())
    columns = batch["input_ids"].shape[1]
    last = columns
    if "completion_mask" in batch:
        last -= int(batch["completion_mask"].any(0).flip(0).long().argmax())
    return {name: c[:, first:last] if c.ndim == 2 and c.shape[1] == columns else c for name, c in batch.items()}
