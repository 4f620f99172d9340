"""Discrete features of a text that a plan may name: how it begins and how long it is.

Legend: N texts, R columns of a text.
"""

import torch
from torch import Tensor

from models.functional.curriculum import text_lengths

OPENING, LENGTH = "text opening", "text length"
OPENINGS, LENGTHS = 127, 8


class TextSignals:
    """Learned from training texts (N, R) that are filled up with `end`.

    text opening: the number of the first token among the 127 most frequent ones, 0 for any other. text length: which eighth of
    the training texts is as long, from 0, the shortest, to 7.
    """

    def __init__(self, texts: Tensor, end: int) -> None:
        self.end = end
        ids, counts = texts[:, 0].unique(return_counts=True)
        self.openings = ids[counts.argsort(descending=True, stable=True)][:OPENINGS]
        shares = torch.arange(1, LENGTHS) / LENGTHS
        self.edges = torch.quantile(text_lengths(texts, end).double(), shares.double())

    def state(self) -> dict[str, list]:
        """What was learned, for JSON."""
        return {"openings": self.openings.tolist(), "edges": self.edges.tolist()}

    @classmethod
    def of_state(cls, state: dict[str, list], end: int) -> "TextSignals":
        """The signals whose `state` it is."""
        signals = cls.__new__(cls)
        signals.end = end
        signals.openings = torch.tensor(state["openings"])
        signals.edges = torch.tensor(state["edges"], dtype=torch.float64)
        return signals

    @property
    def sizes(self) -> dict[str, int]:
        return {OPENING: 1 + len(self.openings), LENGTH: LENGTHS}

    def __call__(self, texts: Tensor) -> dict[str, Tensor]:
        """{signal: (N,)} of texts (N, R)."""
        known = texts[:, :1] == self.openings.to(texts.device)
        opening = torch.where(known.any(-1), 1 + known.long().argmax(-1), 0)
        lengths = text_lengths(texts, self.end).to(self.edges)
        return {OPENING: opening, LENGTH: torch.bucketize(lengths, self.edges).to(texts.device)}
