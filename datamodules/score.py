"""How a datamodule reports the quality of generated responses."""

from dataclasses import dataclass, field
from typing import Protocol

from scipy.stats import binomtest
from torch import Tensor


@dataclass
class Score:
    """Quality of one decoder's responses; None where the data cannot give a value.

    quality: named figures (validity, exact_nll in nats, exact_match, bleu ...), each a mean over the samples it applies to.
    entropy: joint entropy of the unprompted responses in nats, or None.
    distinct: share of different responses among all.
    ci95: 95 % interval (low, high) of a quality figure, by the same name.
    """

    quality: dict[str, float | None]
    entropy: float | None = None
    distinct: float | None = None
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)


class Scorer(Protocol):
    """Scores responses (N, R) to the prompts of their rows (a batch of N rows, see `datamodules.batch`)."""

    def __call__(self, rows: dict[str, Tensor], responses: Tensor) -> Score: ...


def proportion(hits: Tensor) -> tuple[float | None, tuple[float, float] | None]:
    """Mean of a boolean tensor (N,) with its Wilson 95 % interval; (None, None) when empty."""
    if hits.numel() == 0:
        return None, None
    interval = binomtest(int(hits.sum()), hits.numel()).proportion_ci(method="wilson")
    return hits.double().mean().item(), (float(interval.low), float(interval.high))
