"""What monitors read of a model: texts and their conditions, choices, and the results of a search.

Legend: B texts, R tokens of a text, S slots, W choices of a slot.
"""

from typing import NamedTuple

from torch import Tensor


class ProbeBatch(NamedTuple):
    """text (B, R); counts (B, R) bool: tokens that are scored; condition: what the text is conditioned on, (B, ...) each."""

    text: Tensor
    counts: Tensor
    condition: dict[str, Tensor]

    def at(self, index: Tensor | slice) -> "ProbeBatch":
        """The texts of an index."""
        return ProbeBatch(self.text[index], self.counts[index], rows_at(self.condition, index))

    def under(self, condition: dict[str, Tensor]) -> "ProbeBatch":
        """The same texts under another condition."""
        return self._replace(condition=condition)


class Choices(NamedTuple):
    """log_p (B, S, W): log-probabilities; counts (B, S) bool: slots at which something is chosen."""

    log_p: Tensor
    counts: Tensor


class EStep(NamedTuple):
    """What a search for better plans found for this rank's texts, (B,) each, not finite where a text has no such value.

    margins: S(z) of the best candidate before the second, nats per text; gaps: of the best before the current plan, both
    scored now; flips: 1 where the best is another plan than the current one, 0 where it is the same.
    """

    margins: Tensor
    gaps: Tensor
    flips: Tensor


def rows_at(columns: dict[str, Tensor], index: Tensor | slice) -> dict[str, Tensor]:
    """The rows of an index, of each column."""
    return {name: column[index] for name, column in columns.items()}
