"""What π_θ of a pair shows to monitors (the protocols of models/interfaces/probes.py): is its prompt used, how sure is it?

Legend: B batch, P prompt columns, R response columns, V vocabulary.
"""

import torch
from torch import Generator, Tensor, nn

from models.backbones.causal_lm import causal_logits
from models.functional.bits_per_byte import token_nll
from models.functional.next_token import causal_text, until_end
from models.functional.rows import response_columns
from models.interfaces.probe_batch import Choices, Given


class QStarProbes:
    """A mixin of the module. A condition is a prompt: ids and attention mask, (B, P) each; texts are the corpus' own."""

    theta: nn.Module
    words: int
    eos_id: int

    def probe(self, rows: dict[str, Tensor], generator: Generator) -> Given:
        columns = response_columns(rows["response_mask"])
        text = rows["input_ids"][:, -columns:]
        prompt = {name: rows[name][:, :-columns] for name in ("input_ids", "attention_mask")}
        return Given(text, until_end(text, self.eos_id), prompt)

    def probe_nll(self, rows: dict[str, Tensor], given: Given) -> Tensor:
        return token_nll(self._logits(rows, given), given.text)

    def probe_spoiled(self, given: Given, how: str, generator: Generator) -> None:
        """A prompt that says nothing, or a random one, is none that the corpus could have."""
        return None

    def probe_features(self, given: Given) -> None:
        return None

    def probe_choices(self, rows: dict[str, Tensor], generator: Generator) -> dict[str, Choices]:
        """Words of the corpus' texts."""
        given = self.probe(rows, generator)
        return {"theta": Choices(self._logits(rows, given).log_softmax(-1), given.counts)}

    def _logits(self, rows: dict[str, Tensor], given: Given) -> Tensor:
        """Logits (B, R, V) of π_θ at the places of the texts."""
        columns = given.text.shape[1]
        mask = torch.cat([given.condition["attention_mask"], rows["attention_mask"][:, -columns:]], 1)
        ids = torch.cat([given.condition["input_ids"], given.text], 1)
        text = causal_text({"input_ids": ids, "attention_mask": mask, "response_mask": rows["response_mask"]})
        return causal_logits(self.theta, text)[:, -columns:, : self.words].float()
