"""What the texts and the drafts of one decoder were worth, over the batches of a test."""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from models.speculative.state import QStarOutput

TOTALS = ("nll_theta", "nll_target", "tokens", "accepted", "verified", "expected_speedup", "drafted_rows")


class AcceptanceMeter:
    """totals: sums over batches, which ranks add up. exactness: results of the exactness tests, alike on every rank.

    times: (seconds, generated tokens) of each batch of this rank.
    """

    def __init__(self) -> None:
        self.totals = dict.fromkeys(TOTALS, 0.0)
        self.times: list[tuple[float, int]] = []
        self.exactness: dict[str, float | None] = {}

    def add_texts(self, nll_theta: Tensor, nll_target: Tensor) -> None:
        """-log p of every token of a batch under both models, nats."""
        self.totals["nll_theta"] += float(nll_theta.sum())
        self.totals["nll_target"] += float(nll_target.sum())
        self.totals["tokens"] += nll_target.numel()

    def add_drafts(self, out: QStarOutput, expected_speedup: float | None) -> None:
        """A batch of q* texts, and the formula's speed-up at its acceptance rate; None where nothing was drafted."""
        rows = len(out.tokens)
        self.totals["accepted"] += sum(out.accepted.values())
        self.totals["verified"] += sum(out.verified.values())
        self.totals["expected_speedup"] += (expected_speedup or 0.0) * rows
        self.totals["drafted_rows"] += rows

    def add_time(self, seconds: float, out: QStarOutput) -> None:
        """Wall-clock time of a batch."""
        self.times.append((seconds, int(out.lengths.sum())))

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds per generated token, padding not counted; None without a measured batch."""
        seconds, tokens = (sum(part) for part in zip(*self.times, strict=True)) if self.times else (0.0, 0)
        return seconds / tokens if tokens else None

    def sum_over_ranks(self, add: Callable[[list[float]], list[float]]) -> dict[str, float]:
        """The totals of all ranks. add: sums a list of numbers over the ranks; every rank has to call."""
        return dict(zip(TOTALS, add([self.totals[name] for name in TOTALS]), strict=True))

    def quality(self, totals: dict[str, float]) -> dict[str, float | None]:
        """nats per token under both models, and the exactness tests."""
        return {**{name: totals[name] / totals["tokens"] for name in ("nll_theta", "nll_target")}, **self.exactness}

    def cost(self, totals: dict[str, float], naive: "AcceptanceMeter | None") -> dict[str, float | None]:
        """Acceptance rate, and speed-ups over the decoder that runs both models for every token; {} for a plain decoder.

        A speed-up is a ratio of seconds per generated token: texts of two decoders differ in length. q1, q3: quartiles of
        that ratio over the batches.
        """
        if not totals["drafted_rows"]:
            return {}
        ratio, (low, high) = None, (None, None)
        if naive is not None and naive.seconds_per_token and self.seconds_per_token:
            ratio = naive.seconds_per_token / self.seconds_per_token
            pairs = zip(naive.times, self.times, strict=True)
            ratios = [(a / n) / (b / m) for (a, n), (b, m) in pairs if a and b and n and m]
            low, high = np.quantile(ratios, [0.25, 0.75]).tolist()
        return {
            "acceptance": totals["accepted"] / totals["verified"] if totals["verified"] else None,
            "seconds_per_generated_token": self.seconds_per_token,
            "speedup_vs_naive": ratio,
            "speedup_vs_naive_q1": low,
            "speedup_vs_naive_q3": high,
            "speedup_formula": totals["expected_speedup"] / totals["drafted_rows"] or None,
        }
