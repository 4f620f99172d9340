"""Quality of responses to prompts with reference answers: exact match, BLEU, slot accuracy and self-BLEU."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics.functional.text import sacre_bleu_score

from datamodules.score import Score, proportion


class PairsScorer:
    """Scores responses (N, R) against the references of their rows.

    decode: responses (N, R) -> N texts, cut at end-of-text.
    spell: a reference as the tokenizer writes it, so that one that folds white space or case is not punished for it.
    references: for each row id (the column `row_index`), all responses of its split to the same prompt.
    slots: for each row id, the {slot: value} of a dictionary prompt, or None.
    prompts: for each row id, its prompt, which finds the responses to the same one.

    exact_match: share of rows that equal any of their references, in 0..1.
    bleu: corpus SacreBLEU (13a tokens, 4-grams, not smoothed) of all rows against all their references, in 0..100. A
        prompt of several rows counts as often; published figures take one response per prompt.
    slot_accuracy: share of the slot values that occur in the response as whole words, whatever their case, in 0..1,
        averaged over the rows that have any. Slots whose value is yes, no, true or false (such as familyFriendly) are
        skipped, because that word alone does not show that the response states the fact. None when no prompt was
        a dictionary.
    self_bleu: see the function; None where no prompt is answered twice.

    The intervals take rows as independent, which is too narrow where many rows share a prompt.
    """

    def __init__(
        self,
        *,
        decode: Callable[[Tensor], list[str]],
        spell: Callable[[str], str],
        references: Sequence[Sequence[str]],
        slots: Sequence[dict[str, str] | None],
        prompts: Sequence[str],
    ) -> None:
        self.decode, self.spell = decode, spell
        self.references, self.slots, self.prompts = references, slots, prompts

    def __call__(self, rows: dict[str, Tensor], responses: Tensor) -> Score:
        texts = self.decode(responses)
        ids = rows["row_index"].tolist()
        if len(ids) != len(texts):
            raise ValueError(f"{len(texts)} responses for {len(ids)} rows")
        if not texts:
            names = ("exact_match", "bleu", "slot_accuracy", "self_bleu", "validity")
            return Score(quality=dict.fromkeys(names))
        spelled = {text: self.spell(text) for text in {text for i in ids for text in self.references[i]}}
        references = [[spelled[text] for text in self.references[i]] for i in ids]

        right = torch.tensor([text in known for text, known in zip(texts, references, strict=True)])
        exact_match, exact_match_ci = proportion(right)
        bleu = 100 * sacre_bleu_score(texts, references).item()
        shares = [slot_share(self.slots[i] or {}, text) for i, text in zip(ids, texts, strict=True)]
        slot_accuracy, slot_accuracy_ci = _mean([share for share in shares if share is not None])
        intervals = {"exact_match": exact_match_ci, "slot_accuracy": slot_accuracy_ci}
        return Score(
            quality={
                "exact_match": exact_match,
                "bleu": bleu,
                "slot_accuracy": slot_accuracy,
                "self_bleu": self_bleu(texts, [self.prompts[i] for i in ids]),
                "validity": None,
            },
            distinct=len(set(texts)) / len(texts),
            ci95={name: interval for name, interval in intervals.items() if interval is not None},
        )

    def reference_slot_accuracy(self, ids: Sequence[int]) -> float | None:
        """Slot accuracy of the references themselves, averaged over these rows' ids: people paraphrase values too."""
        by_row = [[slot_share(self.slots[i] or {}, text) for text in self.references[i]] for i in ids]
        return _mean([sum(shares) / len(shares) for shares in by_row if shares[0] is not None])[0]


def slot_share(slots: dict[str, str], text: str) -> float | None:
    """Share of the slot values found in the text as whole words; None without a value that can be looked for."""
    values = [value.strip() for value in slots.values()]
    values = [value for value in values if value and value.lower() not in ("yes", "no", "true", "false")]
    if not values:
        return None
    found = [re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) for value in values]
    return sum(match is not None for match in found) / len(values)


def self_bleu(texts: Sequence[str], prompts: Sequence[str]) -> float | None:
    """How alike the answers to one prompt are: corpus SacreBLEU of each against the others, in 0..100 (Zhu et al., 2018).

    Over all prompts that are answered at least twice; None without one. More answers to a prompt raise it, so only figures
    with as many are comparable.
    """
    answers = defaultdict(list)
    for text, prompt in zip(texts, prompts, strict=True):
        answers[prompt].append(text)
    pairs = [(own[k], own[:k] + own[k + 1 :]) for own in answers.values() if len(own) > 1 for k in range(len(own))]
    if not pairs:
        return None
    candidates, others = zip(*pairs, strict=True)
    return 100 * sacre_bleu_score(candidates, others).item()


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
