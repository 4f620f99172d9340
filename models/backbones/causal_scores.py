"""A Hugging Face causal LM as the scores that q* decoding asks for."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.functional.errors import UsageError


class CausalScores:
    """(ids (B, L) right-padded, lengths (B,), count) -> log p (B, count, V) of the tokens at places lengths, lengths + 1, ...

    Every call evaluates whole prefixes: exact and simple, without a key-value cache. What stands beyond a place cannot be
    seen by a causal model, so padding needs no mask.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, ids: Tensor, lengths: Tensor, count: int) -> Tensor:
        width = int(lengths.max()) + count - 1
        logits = self.model(input_ids=ids[:, :width]).logits  # (B, width, V)
        places = lengths.unsqueeze(-1) - 1 + torch.arange(count, device=ids.device)
        chosen = logits.gather(1, places.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
        wide = chosen if chosen.dtype == torch.float64 else chosen.float()
        return wide.log_softmax(-1)


def require_same_vocabulary(theta: PreTrainedModel, target: PreTrainedModel) -> None:
    """Raise UsageError, naming both, unless token ids mean the same: q* multiplies probabilities of the same token."""
    sizes = [model.config.vocab_size for model in (theta, target)]
    if sizes[0] != sizes[1]:
        names = [model.config.name_or_path or type(model).__name__ for model in (theta, target)]
        raise UsageError(
            f"{names[0]} has {sizes[0]} tokens and {names[1]} has {sizes[1]}: q* needs two models of one vocabulary; "
            "choose two of the same family, or resize the embeddings of one"
        )
