"""What a corpus' texts would gain by the concepts that they are given, if prior and executor were the best possible."""

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.slot_table import NamesConcepts
from models.functional.plan_information import code_ceiling


class CodeCeiling(Callback):
    """Adds rate_bits_best, gain_bits_best and efficiency_best to a test's figures: `code_ceiling`, bits a text.

    What is measured falls short of these by training alone. Only where all texts can be listed with their probabilities, and
    where a plan is a function of the text alone.
    """

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        listed = getattr(trainer.datamodule, "list_texts", lambda: None)()
        text_alone = getattr(pl_module, "posterior_reads", "text") == "text"
        if listed is None or not text_alone or not isinstance(pl_module, NamesConcepts):
            return
        data, (prompt, texts) = trainer.datamodule, listed
        concepts = pl_module.concepts_of(rows_of(prompt, texts, pl_module.device)).cpu()
        codes = torch.unique(concepts, dim=0, return_inverse=True)[1]
        reveals, counts = torch.unique(data.rows["test"].columns["reveal"], dim=0, return_counts=True)
        given = torch.stack([data.distribution.log_prob(texts, one.expand(len(texts), -1)).exp() for one in reveals])
        nothing = torch.full_like(reveals[:1], -1).expand(len(texts), -1)
        whole = data.distribution.log_prob(texts, nothing).exp()
        rate, gain = code_ceiling(whole, given, counts.double() / counts.sum(), codes)
        bits = {"rate_bits_best": rate / math.log(2), "gain_bits_best": gain / math.log(2)}
        pl_module.figures |= bits | ({"efficiency_best": gain / rate} if rate > 0 else {})


def rows_of(prompt: Tensor, texts: Tensor, device: Any) -> dict[str, Tensor]:
    """Rows of all texts (T, R), each after the same prompt (P,)."""
    ids = torch.cat([prompt.expand(len(texts), -1), texts], -1)
    response = torch.zeros_like(ids, dtype=torch.bool)
    response[:, len(prompt) :] = True
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(response), "response_mask": response}
    return {name: column.to(device) for name, column in rows.items()}
