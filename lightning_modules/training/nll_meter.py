"""Nats, tokens and bytes summed over batches and ranks, and the ratios of these sums: NLL, perplexity, bits per byte."""

import torch
from torch import Tensor
from torchmetrics import Metric

from models.functional.bits_per_byte import NllSums, bits_per_byte, nats_per_token, perplexity


class NllMeter(Metric):
    """Sums first, ratios last, so that batches and ranks of different sizes weigh as many tokens as they have.

    Bytes are counted where a batch has `target_bytes`; special tokens, which have none, add no nats to it.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens", "text_nats", "text_bytes"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: int, target_bytes: Tensor | None = None) -> None:
        """nll (B, L) nats by position, 0 where nothing counts; tokens: how many count; target_bytes (B, L)."""
        wide = nll.detach().double()
        self.nats += wide.sum()
        self.tokens += tokens
        if target_bytes is not None:
            self.text_nats += wide[target_bytes > 0].sum()
            self.text_bytes += target_bytes.sum()

    def compute(self) -> dict[str, float]:
        """`nll` in nats per token, `perplexity`, and `bits_per_byte` where bytes were counted; {} where nothing was."""
        sums = NllSums(self.nats, self.tokens, self.text_nats, self.text_bytes)
        if sums.tokens == 0:
            return {}
        figures = {"nll": nats_per_token(sums), "perplexity": perplexity(sums)}
        if sums.text_bytes > 0:
            figures["bits_per_byte"] = bits_per_byte(sums)
        return {name: float(value) for name, value in figures.items()}
