"""Span corruption and prefix language modelling, mixed as in UL2: a bidirectional input, a causal target.

One causal body does both: the input is a prefix with bidirectional attention.
Legend: B batch, P prompt columns, R columns that can be targets, L = P + R.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.backbones.causal_lm import causal_nll, require_causal
from models.functional.attention import positions_from_mask
from models.functional.errors import UsageError
from models.functional.next_token import (
    CausalText,
    align_with_columns,
    bidirectional_text,
    causal_text,
    prefix_mask,
    read_columns,
)
from models.functional.span_corruption import input_and_target, random_spans, span_counts
from models.interfaces.objective import Terms, TextObjective


class SpanCorruption(TextObjective):
    """Mean cross entropy of the target's tokens. Each batch draws one of three denoisers with probability `mix`.

    mix: `short` cuts out 15 % of the tokens in spans of 3, `long` half of them in spans of 3 (UL2's R and X), `prefix` asks
        for everything after a random position (S). Prompts are never targets. {prefix: 1} alone is a prefix language model.
    """

    likelihood = "exact"
    generation = "prefix"
    kinds_of_batch = 16
    spans = {"short": (0.15, 3.0), "long": (0.5, 3.0)}  # noqa: RUF012

    def __init__(self, mix: dict[str, float] | None = None) -> None:
        self.mix = mix or {"short": 0.25, "long": 0.25, "prefix": 0.5}
        unknown = set(self.mix) - {*self.spans, "prefix"}
        if unknown or min(self.mix.values()) < 0 or sum(self.mix.values()) <= 0:
            raise UsageError(
                f"module.objective.mix={self.mix} must give weights to short, long and prefix; type for example "
                "module.objective.mix={short:1,long:1,prefix:2}"
            )

    def attach(self, model: nn.Module) -> None:
        require_causal(model, "span_corruption")
        if "mask_token_id" not in model.config.to_dict() and set(self.mix) != {"prefix"}:
            raise UsageError("the model has no mask token to replace a span; type module/objective=prefix_lm")

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Terms:
        x0, seen, asked = self._columns(batch)
        first = 0 if "labels" in batch else int((~asked[0]).sum())
        length, low = (
            x0.shape[1] - first,
            int(first == 0),
        )  # a packed row has no prompt: its first token is never a target
        if length == low:
            return _without_target(x0)
        # 1. which denoiser
        weights = torch.tensor(list(self.mix.values()), device=generator.device)
        kind = list(self.mix)[int(torch.multinomial(weights, 1, generator=generator))]
        # 2. the input and the target; a single token has no spans
        if kind == "prefix" or length == 1:
            split = first + int(torch.randint(low, length, (1,), generator=generator, device=x0.device))
            question, answer, counts = x0[:, :split], x0[:, split:], asked[:, split:]
        else:
            cut = random_spans(len(x0), length, *span_counts(length, *self.spans[kind]), generator, x0.device)
            question, answer = input_and_target(x0[:, first:], cut, model.config.mask_token_id)
            question, counts = torch.cat([x0[:, :first], question], -1), torch.ones_like(answer, dtype=torch.bool)
        # 3. the target's cross entropy given the input
        ids, read = torch.cat([question, answer], -1), question.shape[1]
        seen = F.pad(seen[:, :first], (0, ids.shape[1] - first), value=True)
        nll = prefix_nll(model, ids, seen, F.pad(counts, (read, 0)), read)
        return Terms.over_tokens(nll.sum(), int(counts.sum()), nll)

    def text_nll(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        if "labels" in batch:  # there is no prompt: causal attention throughout
            text = causal_text(batch)
            return align_with_columns(causal_nll(model, text), batch)
        ids, seen, asked = self._columns(batch)
        return prefix_nll(model, ids, seen, asked, int((~asked[0]).sum()))

    def _columns(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """ids, what is read and what can be a target, (B, L) each."""
        x0, attention_mask, asked = bidirectional_text(batch)
        return x0, attention_mask if "labels" in batch else read_columns(batch), asked


def _without_target(x0: Tensor) -> Terms:
    """The loss 0 of a packed row of one token, such as the last of a validation. Errors: UsageError in training."""
    if torch.is_grad_enabled():
        raise UsageError("data.sequence_length=1 leaves no target; type data.sequence_length=2 or more")
    nll = torch.zeros(x0.shape, device=x0.device)
    return Terms.over_tokens(nll.sum(), 0, nll)


def prefix_nll(model: nn.Module, ids: Tensor, seen: Tensor, counts: Tensor, prefix: int) -> Tensor:
    """-log p(x_l | prefix and what is between) where `counts`, 0 elsewhere: (B, L) nats; the first `prefix` are read."""
    mask = prefix_mask(seen[:, :-1], prefix, next(model.parameters()).dtype)
    text = CausalText(ids[:, :-1], ids[:, 1:], counts[:, 1:], mask, positions_from_mask(seen)[:, :-1])
    return F.pad(causal_nll(model, text), (1, 0))
