"""What the drafts of texts were worth, counted over batches."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any


@dataclass(frozen=True)
class DraftTotals:
    """tokens: generated. drafts: of each row counted alone. undrafted: rounds, of each row counted alone, without a draft.

    verified_at, accepted_at: by position in a draft, the tokens that were verified there, and those accepted.
    """

    tokens: int = 0
    drafts: int = 0
    undrafted: int = 0
    verified_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()

    def __add__(self, other: "DraftTotals") -> "DraftTotals":
        return DraftTotals(
            self.tokens + other.tokens,
            self.drafts + other.drafts,
            self.undrafted + other.undrafted,
            _sum(self.verified_at, other.verified_at),
            _sum(self.accepted_at, other.accepted_at),
        )

    @property
    def acceptance(self) -> float:
        """Accepted tokens over verified ones."""
        return sum(self.accepted_at) / max(1, sum(self.verified_at))

    @property
    def acceptance_at(self) -> list[float]:
        """By position in a draft, the share of tokens accepted of those verified there."""
        return [a / v for a, v in zip(self.accepted_at, self.verified_at, strict=True) if v]

    @property
    def accepted_length(self) -> float:
        """Accepted tokens of a draft, in the mean; the token after them is not counted. 0 without a draft."""
        return sum(self.accepted_at) / max(1, self.drafts)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of a row for each forward pass of a verifier over it, the first one, over the prompt, included.

        The token after a draft is counted. For drafts of a third model or of n-grams; rows of a batch are counted alone.
        """
        return self.tokens / max(1, self.drafts + self.undrafted)

    @property
    def tokens_per_draft(self) -> float:
        """The same of rounds with a draft alone."""
        return (self.tokens - self.undrafted) / max(1, self.drafts)

    def figures(self) -> dict[str, Any]:
        """By the names of `record.json`; {} without a draft."""
        if not self.drafts:
            return {}
        return {
            "acceptance": self.acceptance,
            "acceptance_at": self.acceptance_at,
            "accepted_length": self.accepted_length,
            "tokens_per_verifier_forward": self.tokens_per_forward,
            "tokens_per_draft_verified": self.tokens_per_draft,
            "drafts": self.drafts,
        }


def _sum(first: Iterable[int], second: Iterable[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(first, second, fillvalue=0))
