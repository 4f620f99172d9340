"""Multi-token prediction: from each position the next n tokens at once (Gloeckle et al., 2404.19737).

The first head is the model's own, so its likelihood and generation are those of next-token prediction. The others read the
same hidden states through a residual block each and share the output layer; they can draft tokens for the first to check.
Legend: B batch, T positions, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.backbones.causal_lm import (
    causal_hidden,
    causal_nll,
    output_head,
    output_logits,
    require_causal,
    require_known_output,
)
from models.functional.errors import UsageError
from models.functional.next_token import align_with_columns, causal_text, shifted_targets
from models.functional.nll import chosen_nll
from models.interfaces.objective import Terms, TextObjective


class AheadHead(nn.Module):
    """h + W silu(U norm(h)), (..., D) -> (..., D): the hidden state that predicts a later token. It starts as h."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.silu(self.up(self.norm(hidden))))


class MultiToken(TextObjective, nn.Module):
    """The sum over heads of their mean cross entropy: loss = sum_k mean_t -log p_k(x_{t+k} | x_{<=t}), k = 1..n.

    A head counts over the positions whose k-th next token exists; `tokens` and `position_nll` are those of the first head.
    """

    likelihood = "exact"
    generation = "autoregressive"

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        if n < 1:
            raise UsageError(f"module.objective.n={n} must be at least 1, the next token")
        self.n = n
        self.heads = nn.ModuleList()

    def attach(self, model: nn.Module) -> None:
        require_causal(model, "multi_token")
        require_known_output(model)
        weight = output_head(model).weight
        self.heads.extend(AheadHead(weight.shape[-1]) for _ in range(self.n - 1))
        self.heads.to(device=weight.device, dtype=torch.float32 if weight.dtype.itemsize < 4 else weight.dtype)

    def loss_is_nll(self, batch: dict[str, Tensor]) -> bool:
        return True

    def logits(self, model: nn.Module, hidden: Tensor, ahead: int) -> Tensor:
        """Logits (..., V) of the token `ahead` positions later, from hidden states (..., D)."""
        if ahead > 1:
            head = self.heads[ahead - 2]
            hidden = head(hidden.to(head.up.weight.dtype)).to(hidden.dtype)
        return output_logits(model, hidden)

    def forward(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Terms:
        text = causal_text(batch)
        hidden = causal_hidden(model, text)
        tokens = int(text.weights.sum())
        loss_sum, first = hidden.new_zeros((), dtype=torch.float32), None
        for ahead in range(1, self.n + 1):
            targets, weights = shifted_targets(text, ahead)
            nll = chosen_nll(self.logits(model, hidden[weights], ahead), targets, weights)
            first = nll if first is None else first
            # the mean over a head's own positions, so that a short text does not make far heads count less
            loss_sum = loss_sum + nll.sum() * (tokens / max(1, int(weights.sum())))
        assert first is not None  # n is at least 1
        return Terms.over_tokens(loss_sum, tokens, align_with_columns(first, batch))

    def text_nll(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        return align_with_columns(causal_nll(model, causal_text(batch)), batch)
