"""Quality of responses to prompts whose right answers are known: exact match, BLEU and slot accuracy."""

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics.functional.text import sacre_bleu_score

from datamodules.score import Score, proportion


class PairsScorer:
    """Judges responses (N, R) against the references of the rows that they answer.

    decode: responses (N, R) -> N texts, cut at end-of-text.
    spell: a reference as the tokenizer writes it, so that one that folds white space or case is not punished for it.
    references: for each row id (the column `row_index`), all responses that its split knows for the same prompt.
    slots: for each row id, the {slot: value} of a dictionary prompt, or None.

    exact_match: share of rows that equal any of their references, in 0..1.
    bleu: corpus SacreBLEU (13a tokens, 4-grams, not smoothed) of all rows against all their references, in 0..100. A
        prompt that stands in several rows counts as often; published figures take one response per prompt.
    slot_accuracy: share of the slot values that stand in the response as whole words, whatever their case, in 0..1,
        averaged over the rows that have any. Slots whose value is yes, no, true or false (such as familyFriendly) are
        skipped, because finding that word would not tell whether the response states the fact. None when no prompt was
        a dictionary.

    The intervals take rows as independent, which is too narrow where many rows share a prompt.
    """

    def __init__(
        self,
        *,
        decode: Callable[[Tensor], list[str]],
        spell: Callable[[str], str],
        references: Sequence[Sequence[str]],
        slots: Sequence[dict[str, str] | None],
    ) -> None:
        self.decode, self.spell, self.references, self.slots = decode, spell, references, slots

    def __call__(self, rows: dict[str, Tensor], responses: Tensor) -> Score:
        texts = self.decode(responses)
        ids = rows["row_index"].tolist()
        if len(ids) != len(texts):
            raise ValueError(f"{len(texts)} responses for {len(ids)} rows")
        if not texts:
            return Score(quality={"exact_match": None, "bleu": None, "slot_accuracy": None, "validity": None})
        spelled = {text: self.spell(text) for text in {text for i in ids for text in self.references[i]}}
        references = [[spelled[text] for text in self.references[i]] for i in ids]

        right = torch.tensor([text in known for text, known in zip(texts, references, strict=True)])
        exact_match, exact_match_ci = proportion(right)
        bleu = 100 * sacre_bleu_score(texts, references).item()
        shares = [slot_share(self.slots[i] or {}, text) for i, text in zip(ids, texts, strict=True)]
        slot_accuracy, slot_accuracy_ci = _mean([share for share in shares if share is not None])
        intervals = {"exact_match": exact_match_ci, "slot_accuracy": slot_accuracy_ci}
        return Score(
            quality={"exact_match": exact_match, "bleu": bleu, "slot_accuracy": slot_accuracy, "validity": None},
            distinct=len(set(texts)) / len(texts),
            ci95={name: interval for name, interval in intervals.items() if interval is not None},
        )


def slot_share(slots: dict[str, str], text: str) -> float | None:
    """Share of the slot values found in the text as whole words; None without a value that can be looked for."""
    values = [value.strip() for value in slots.values()]
    values = [value for value in values if value and value.lower() not in ("yes", "no", "true", "false")]
    if not values:
        return None
    found = [re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) for value in values]
    return sum(match is not None for match in found) / len(values)


def _mean(shares: list[float]) -> tuple[float | None, tuple[float, float] | None]:
    """Mean with its normal 95 % interval within 0..1; no interval from fewer than two values."""
    if not shares:
        return None, None
    values = torch.tensor(shares, dtype=torch.float64)
    mean = values.mean().item()
    if len(shares) < 2:
        return mean, None
    half = 1.96 * values.std().item() / math.sqrt(len(shares))
    return mean, (max(0.0, mean - half), min(1.0, mean + half))
