"""π_θ of a pair for monitors (the protocols of models/interfaces/probes.py): its NLL given a prompt, and its distributions.

Legend: B batch, P prompt columns, R response columns, V vocabulary.
"""

import torch
from torch import Generator, Tensor, nn

from models.backbones.causal_lm import causal_logits
from models.functional.bits_per_byte import token_nll
from models.functional.next_token import EndIds, causal_text, until_end
from models.functional.rows import response_columns
from models.interfaces.probe_batch import Choices, ProbeBatch


class PromptProbe:
    """A condition is a prompt: ids and attention mask, (B, P) each; texts are the corpus' own."""

    def __init__(self, theta: nn.Module, vocab_size: int, end_ids: EndIds) -> None:
        """vocab_size: ids from there on are padding of the output layer."""
        self.theta, self.vocab_size, self.end_ids = theta, vocab_size, end_ids

    def probe_batch(self, rows: dict[str, Tensor], generator: Generator) -> ProbeBatch:
        columns = response_columns(rows["response_mask"])
        text = rows["input_ids"][:, -columns:]
        prompt = {name: rows[name][:, :-columns] for name in ("input_ids", "attention_mask")}
        return ProbeBatch(text, until_end(text, self.end_ids), prompt)

    def nll(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        return token_nll(self._logits(rows, batch), batch.text)

    def corrupt_condition(self, batch: ProbeBatch, how: str, generator: Generator) -> None:
        """None: an empty or a random prompt is none that the corpus could have."""
        return None

    def condition_features(self, batch: ProbeBatch) -> None:
        return None

    def choices(self, rows: dict[str, Tensor], generator: Generator) -> dict[str, Choices]:
        """The distribution of every token of the corpus' texts."""
        batch = self.probe_batch(rows, generator)
        return {"theta": Choices(self._logits(rows, batch).log_softmax(-1), batch.counts)}

    def _logits(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        """Logits (B, R, V) of π_θ at the positions of the texts."""
        columns = batch.text.shape[1]
        mask = torch.cat([batch.condition["attention_mask"], rows["attention_mask"][:, -columns:]], 1)
        ids = torch.cat([batch.condition["input_ids"], batch.text], 1)
        text = causal_text({"input_ids": ids, "attention_mask": mask, "response_mask": rows["response_mask"]})
        return causal_logits(self.theta, text)[:, -columns:, : self.vocab_size].float()
