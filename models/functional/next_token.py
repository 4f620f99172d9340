r"""Next-token prediction: inputs and targets of a causal model.

.. math:: -\log p(x) = -\sum_t \log p(x_t \mid x_{<t})

Several tokens at once: Gloeckle et al., Better & Faster Large Language Models via Multi-token Prediction (2404.19737).
Legend: B batch, L columns, T input positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.functional.attention import positions_from_mask
from models.functional.errors import UsageError

IGNORED = -100  # the label of a position without a target
EndIds = (
    int | Sequence[int] | None
)  # the tokens that end a text, as `eos_token_id` of Hugging Face's generate: one, several or none


class CausalText(NamedTuple):
    """Inputs and targets of a causal model. All (B, T).

    ids: input tokens; targets: the token after each; weights: bool, True where the target is scored.
    attention_mask: bool, False on left padding, or None where nothing is padding.
    position_ids: index of each position in its text, or None for 0, 1, 2 ...
    document_ids: the document of each position, or None where a row is one text.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None


def causal_text(batch: dict[str, Tensor]) -> CausalText:
    """Packed rows (`labels` hold the next tokens) or prompt -> response rows (`response_mask`) as `CausalText`.

    Of a prompt -> response row only response tokens are scored, each conditioned on everything before it, so that their NLL
    sums to -log p(response | prompt); where the batch has a `completion_mask`, those up to the first end token.
    """
    if "labels" in batch:
        labels = batch["labels"]
        weights = labels != IGNORED
        targets = labels.masked_fill(~weights, 0)
        return CausalText(
            batch["input_ids"], targets, weights, None, batch.get("position_ids"), batch.get("document_ids")
        )
    ids, seen = batch["input_ids"], read_columns(batch)
    return CausalText(
        ids[:, :-1], ids[:, 1:], completion_mask(batch)[:, 1:], seen[:, :-1], positions_from_mask(seen)[:, :-1]
    )


def completion_mask(batch: dict[str, Tensor]) -> Tensor:
    """(B, L) bool: the columns of prompt -> response rows that a causal model is scored on."""
    return batch["completion_mask"] if "completion_mask" in batch else batch["response_mask"]


def read_columns(batch: dict[str, Tensor]) -> Tensor:
    """(B, L) bool: the columns that a causal model reads; a row without a prompt begins with a padding token."""
    return batch["attention_mask"] | before_response(batch["response_mask"])


def before_response(response_mask: Tensor) -> Tensor:
    """(B, L) bool: the one position before the response, from which its first token is predicted."""
    first = F.pad(response_mask[:, 1:], (0, 1)) & ~response_mask
    return first & (first.cumsum(-1) == 1)


def are_ends(ids: Tensor, end_ids: EndIds) -> Tensor:
    """Whether each id is a token that ends a text; bool of any shape."""
    return torch.isin(ids, torch.tensor(as_end_ids(end_ids), dtype=ids.dtype, device=ids.device))


def as_end_ids(end_ids: EndIds) -> tuple[int, ...]:
    return () if end_ids is None else (end_ids,) if isinstance(end_ids, int) else tuple(end_ids)


def until_end(ids: Tensor, end_ids: EndIds) -> Tensor:
    """(B, R) bool: the tokens of responses up to their first end token, that one included; all where there is none."""
    end = are_ends(ids, end_ids)
    return end.cumsum(-1) - end.long() == 0


def generated_until_end(tokens: list[Tensor], end_ids: EndIds, length: int | None = None) -> Tensor:
    """n tokens (B,) each, in the order of generation, as (B, n); the first of end_ids fills what is after a row's end.

    length: of the result, where all rows ended before it.
    """
    together = torch.stack(tokens, -1)
    fill = next(iter(as_end_ids(end_ids)), 0)
    together = together.masked_fill(~until_end(together, end_ids), fill)
    return together if length is None else F.pad(together, (0, length - len(tokens)), value=fill)


def bidirectional_text(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a bidirectional model: ids, attention_mask and which tokens can be masked; (B, L) each.

    Of packed rows the labels are read: every token of the stream is read once, in the column in which `target_bytes` counts
    it. Errors: UsageError for rows of several documents, which causal objectives alone keep apart, and for rows whose end
    padding is left out, which these models have to fill.
    """
    if "completion_mask" in batch:
        raise UsageError(
            "data.end_padding=false is for causal models; type data.end_padding=true for one that fills masks"
        )
    if "document_ids" in batch:
        raise UsageError("data.document_mask=true needs module/objective=next_token, multi_token or latent")
    if "labels" in batch:
        real = batch["labels"] != IGNORED
        return batch["labels"].masked_fill(~real, 0), torch.ones_like(real), real
    return batch["input_ids"], batch["attention_mask"], batch["response_mask"]


def shifted_targets(text: CausalText, ahead: int) -> tuple[Tensor, Tensor]:
    """Targets and weights, both (B, T), of a head that predicts the token `ahead` positions later; ahead=1 is the next one.

    A target is scored where the next token is scored, the token itself is, and both positions are of the same document.
    """
    off = ahead - 1
    if off == 0:
        return text.targets, text.weights
    weights = text.weights & _shifted(text.weights, off, False)
    if text.document_ids is not None:
        weights = weights & (text.document_ids == _shifted(text.document_ids, off, -1))
    return _shifted(text.targets, off, 0), weights


def _shifted(columns: Tensor, off: int, beyond: int) -> Tensor:
    """(B, T) -> (B, T): the value `off` positions later in its row, `beyond` after the row's end."""
    return F.pad(columns, (0, off), value=beyond)[:, off:]


def align_with_columns(nll: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(B, T) -> one value for each column of the batch: those of `labels`, or of `input_ids`, whose first column has 0."""
    return nll if "labels" in batch else F.pad(nll, (1, 0))


def prefix_mask(seen: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores of a prefix language model, (B, 1, L, L): 0 where a key is visible.

    Attention is bidirectional among the first `prefix` columns and causal after them; seen (B, L) bool is False on padding. A
    padding query sees itself, so that no row of scores is empty.
    """
    length = seen.shape[-1]
    position = torch.arange(length, device=seen.device)
    allowed = (position <= position.unsqueeze(-1)) | (position < prefix)
    allowed = (allowed & seen.unsqueeze(1)) | torch.eye(length, dtype=torch.bool, device=seen.device)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def token_counts(batch: dict[str, Tensor]) -> int:
    """How many tokens of a batch are scored: labels that count, or response tokens."""
    return int((batch["labels"] != IGNORED).sum() if "labels" in batch else completion_mask(batch).sum())
