"""Which masked positions a forward pass commits, where their number follows the model's confidence.

A rule looks at the drawn tokens of the positions that compete, and commits at least one of them in each row, so that every
forward pass makes progress.
Legend: B batch, R response columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from models.functional.errors import UsageError, require_choice

RuleName = Literal["confidence", "entropy", "factor"]


class CommitRule(Protocol):
    @property
    def name(self) -> str:
        """How the rule stands in tables."""
        ...

    def __call__(self, confidence: Tensor, entropy: Tensor, competing: Tensor) -> Tensor:
        """Positions to commit (B, R) bool.

        confidence (B, R): probability of the drawn token. entropy (B, R): of the position's distribution, nats.
        competing (B, R) bool: masked positions of the block.
        """
        ...


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Every position whose confidence is at least `threshold` (Fast-dLLM, Wu et al., 2505.22618)."""

    threshold: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UsageError(
                f"module.commit_rules.confidence={self.threshold} must lie above 0 and at most 1, such as 0.9"
            )

    @property
    def name(self) -> str:
        return f"confidence ≥ {self.threshold:g}"

    def __call__(self, confidence: Tensor, entropy: Tensor, competing: Tensor) -> Tensor:
        return (confidence >= self.threshold) & competing | most_confident(confidence, competing)


@dataclass(frozen=True)
class ConfidenceFactor:
    """The n most confident positions with the largest n for which (n + 1)(1 - c_n) < factor (Fast-dLLM, 2505.22618).

    c_n: the n-th largest confidence. Committing n positions independently is then near their joint distribution.
    """

    factor: float

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise UsageError(f"module.commit_rules.factor={self.factor} must be above 0, such as 1.0")

    @property
    def name(self) -> str:
        return f"factor {self.factor:g}"

    def __call__(self, confidence: Tensor, entropy: Tensor, competing: Tensor) -> Tensor:
        c, order = confidence.masked_fill(~competing, -1.0).sort(-1, descending=True)
        n = torch.arange(1, c.shape[-1] + 1, device=c.device)
        holds = ((n + 1) * (1 - c) < self.factor) & competing.gather(-1, order)
        largest = (holds * n).amax(-1, keepdim=True)
        chosen = torch.zeros_like(competing).scatter(-1, order, n <= largest)
        return chosen | most_confident(confidence, competing)


@dataclass(frozen=True)
class EntropyBudget:
    """The positions of least entropy, as many as keep sum(H) - max(H) at most `budget` nats (EB-Sampler, 2505.24857).

    The bound is on the total correlation that drawing them independently can lose.
    """

    budget: float

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise UsageError(f"module.commit_rules.entropy={self.budget} must be at least 0 nats, such as 0.1")

    @property
    def name(self) -> str:
        return f"entropy ≤ {self.budget:g}"

    def __call__(self, confidence: Tensor, entropy: Tensor, competing: Tensor) -> Tensor:
        h, order = entropy.masked_fill(~competing, torch.inf).sort(-1)  # the largest so far is the last one
        before = h.masked_fill(h.isinf(), 0.0).cumsum(-1) - h.masked_fill(h.isinf(), 0.0)
        within = (before <= self.budget) & competing.gather(-1, order)
        return torch.zeros_like(competing).scatter(-1, order, within)


def most_confident(confidence: Tensor, competing: Tensor) -> Tensor:
    """The most confident competing position of each row, (B, R) bool; none in rows where nothing competes."""
    best = confidence.masked_fill(~competing, -1.0).argmax(-1, keepdim=True)
    return torch.zeros_like(competing).scatter(-1, best, True) & competing


RULES: dict[str, Callable[[float], CommitRule]] = {
    "confidence": ConfidenceThreshold,
    "entropy": EntropyBudget,
    "factor": ConfidenceFactor,
}


def build_rules(wanted: Mapping[str, Sequence[float]] | None, option: str = "module.commit_rules") -> list[CommitRule]:
    """{rule: values} -> one rule for each value. Errors: UsageError that names the option, for other names and values."""
    rules: list[CommitRule] = []
    for name, values in (wanted or {}).items():
        require_choice(option, name, get_args(RuleName))
        try:
            rules += [RULES[name](float(value)) for value in values]
        except UsageError as error:
            raise UsageError(str(error).replace("module.commit_rules", option)) from None
    return rules
