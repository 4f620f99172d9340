"""Latent prediction: from each position, the hidden states of the next span in an averaged copy of the body.

No token is predicted, so there is neither a likelihood nor generation; the hidden states are the result.
Legend: B batch, T positions, D width, N positions that count.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.backbones.causal_lm import causal_hidden, output_head, require_causal
from models.functional.errors import UsageError, require_at_least
from models.functional.latent import covariance_penalty, next_span_mean, variance_penalty
from models.functional.next_token import align_with_columns, causal_text, shifted_targets
from models.functional.nll import at_chosen
from models.functional.weights import trainable_weights, update_average
from models.interfaces.objective import Terms, TextObjective


class Latent(TextObjective, nn.Module):
    """Mean of |predictor(h_t) - mean of the next `span` target states|² / D, plus VICReg's two penalties on the states.

    The target states are those of an exponential average of the body (`decay`), normalised over their dimensions.
    `position_nll` is the squared error, which is no likelihood.
    """

    def __init__(
        self, span: int = 4, *, decay: float = 0.99, variance_weight: float = 1.0, covariance_weight: float = 0.04
    ) -> None:
        super().__init__()
        if span < 1:
            raise UsageError(f"module.objective.span={span} must be at least 1")
        if not 0 <= decay < 1:
            raise UsageError(f"module.objective.decay={decay} must be at least 0 and less than 1")
        weights = {"variance_weight": variance_weight, "covariance_weight": covariance_weight}
        require_at_least(0, **{f"module__objective__{name}": weight for name, weight in weights.items()})
        self.span, self.decay = span, decay
        self.variance_weight, self.covariance_weight = variance_weight, covariance_weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def attach(self, model: nn.Module) -> None:
        require_causal(model, "latent")
        self.target = copy.deepcopy(model).requires_grad_(False).eval()
        head = output_head(model)
        width = head.weight.shape[-1]
        self.predictor = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.predictor.to(head.weight)
        if head.weight is not model.get_input_embeddings().weight:
            head.requires_grad_(False)  # no token is predicted, so it would have no gradient

    def after_step(self, model: nn.Module) -> None:
        average = dict(self.target.named_parameters())
        update_average({name: average[name] for name in trainable_weights(model)}, model, self.decay, int(self.steps))
        self.steps += 1

    def forward(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Terms:
        text = causal_text(batch)
        # 1. where a whole span of states follows, of the same document
        _, counts = shifted_targets(text, self.span + 1)
        if self.training and not counts.any():
            raise UsageError(f"no text is longer than module.objective.span={self.span}; type a smaller number")
        # 2. what is predicted, and what it should be
        z = _normalised(causal_hidden(model, text)[counts])
        with torch.no_grad():
            target = next_span_mean(_normalised(causal_hidden(self.target, text)), self.span)[counts]
        error = (self.predictor(z) - target).square().mean(-1)
        # 3. the guard: states spread out, in all directions
        penalty = self.variance_weight * variance_penalty(z) + self.covariance_weight * covariance_penalty(z)
        tokens = int(counts.sum())
        errors = align_with_columns(at_chosen(counts, error), batch)
        return Terms.over_tokens(error.sum() + tokens * penalty, tokens, errors)


def _normalised(states: Tensor) -> Tensor:
    return F.layer_norm(states, states.shape[-1:])
