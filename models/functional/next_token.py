r"""Next-token prediction: what a causal model reads and says, and the nats it needs for it.

.. math:: -\log p(x) = -\sum_t \log p(x_t \mid x_{<t})

Several tokens at once: Gloeckle et al., Better & Faster Large Language Models via Multi-token Prediction (2404.19737).
Legend: B batch, L columns, T positions that are read, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.functional.attention import positions_from_mask
from models.functional.errors import UsageError

IGNORED = -100  # a label that is nobody's target


class CausalText(NamedTuple):
    """What is read and what is to be said. All (B, T).

    ids: read; targets: the token after each; weights: bool, True where the target counts.
    attention_mask: bool, False on left padding, or None where nothing is padding.
    position_ids: where a position stands in its text, or None for 0, 1, 2 ...
    document_ids: which document a position belongs to, or None where a row is one text.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None


def causal_text(batch: dict[str, Tensor]) -> CausalText:
    """Packed rows (`labels` hold the next tokens) or prompt -> response rows (`response_mask`) as `CausalText`.

    Of a prompt -> response row only response tokens count, each given everything before it, so their sum is
    -log p(response | prompt).
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
        ids[:, :-1], ids[:, 1:], batch["response_mask"][:, 1:], seen[:, :-1], positions_from_mask(seen)[:, :-1]
    )


def read_columns(batch: dict[str, Tensor]) -> Tensor:
    """(B, L) bool: the columns that are read from left to right; a row without a prompt begins with its padding token."""
    return batch["attention_mask"] | before_response(batch["response_mask"])


def before_response(response_mask: Tensor) -> Tensor:
    """(B, L) bool: the one position before the response, from which its first token is predicted."""
    first = F.pad(response_mask[:, 1:], (0, 1)) & ~response_mask
    return first & (first.cumsum(-1) == 1)


def until_end(said: Tensor, eos_id: int | None) -> Tensor:
    """(B, R) bool: the tokens of responses up to their first end token, that one included; all where there is none."""
    if eos_id is None:
        return torch.ones_like(said, dtype=torch.bool)
    end = said == eos_id
    return end.cumsum(-1) - end.long() == 0


def generated_until_end(said: list[Tensor], eos_id: int | None) -> Tensor:
    """Tokens (B,), one after the other, as (B, n); what follows a row's first end token is filled with it."""
    together = torch.stack(said, -1)
    return together if eos_id is None else together.masked_fill(~until_end(together, eos_id), eos_id)


def bidirectional_text(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a model that looks both ways reads: ids, attention_mask and which tokens may be hidden; (B, L) each.

    Packed rows are their labels, so that every token of the stream is read once and stands where `target_bytes` counts it.
    Errors: UsageError for rows of several documents, which are kept apart by causal objectives alone.
    """
    if "document_ids" in batch:
        raise UsageError("data.document_mask=true needs module/objective=next_token, multi_token or latent")
    if "labels" in batch:
        real = batch["labels"] != IGNORED
        return batch["labels"].masked_fill(~real, 0), torch.ones_like(real), real
    return batch["input_ids"], batch["attention_mask"], batch["response_mask"]


def shifted_targets(text: CausalText, ahead: int) -> tuple[Tensor, Tensor]:
    """Targets and weights, both (B, T), of a head that predicts the token `ahead` places on; ahead=1 is the next one.

    It counts where the next token counts, the token itself counts, and both positions read the same document.
    """
    off = ahead - 1
    if off == 0:
        return text.targets, text.weights
    weights = text.weights & _further_on(text.weights, off, False)
    if text.document_ids is not None:
        weights = weights & (text.document_ids == _further_on(text.document_ids, off, -1))
    return _further_on(text.targets, off, 0), weights


def _further_on(columns: Tensor, off: int, beyond: int) -> Tensor:
    """(B, T) -> (B, T): what stands `off` places on in its row, `beyond` after the row's end."""
    return F.pad(columns, (0, off), value=beyond)[:, off:]


def align_with_columns(nll: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(B, T) -> one figure for each column of the batch: those of `labels`, or of `input_ids`, whose first has none."""
    return nll if "labels" in batch else F.pad(nll, (1, 0))


def prefix_mask(seen: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores of a prefix language model, (B, 1, L, L): 0 where a key may be seen.

    The first `prefix` columns see each other both ways, later ones everything before them; seen (B, L) bool is False on
    padding. A padding query sees itself, so that no row of scores is empty.
    """
    length = seen.shape[-1]
    place = torch.arange(length, device=seen.device)
    allowed = (place <= place.unsqueeze(-1)) | (place < prefix)
    allowed = (allowed & seen.unsqueeze(1)) | torch.eye(length, dtype=torch.bool, device=seen.device)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def token_counts(batch: dict[str, Tensor]) -> int:
    """How many tokens of a batch are scored: labels that count, or response tokens."""
    return int((batch["labels"] != IGNORED).sum() if "labels" in batch else batch["response_mask"].sum())
