"""Best rate, gain and efficiency that a plan's codes allow: what the best possible prior and executor would reach."""

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Generator, Tensor

from callbacks.monitors.rows import in_parts
from models.functional.next_token import until_end
from models.functional.one_forward import total_correlation_given
from models.functional.plan_information import code_ceiling, entropy
from models.functional.rows import signal_columns
from models.interfaces.probes import ConceptProbe, find_probe


class CodeCeiling(Callback):
    """Adds to a test's figures, where all texts can be enumerated with their probabilities p(x):

    rate_bits_best, gain_bits_best, efficiency_best: `code_ceiling`, bits a text. The measured figures differ from these by
    training alone.
    nll_enumerated: the executor's NLL over all texts, weighted by p(x), nats a token; nll_enumerated_best: H(x | z), the
        least that any executor can reach. A mean over test texts has sampling noise, which these have not.
    total_correlation_given_plan: TC(x | z), nats a token, the least that an executor loses which writes a text in one forward
        pass (`total_correlation_given`); one that writes token after token loses nothing.
    """

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        listed = getattr(trainer.datamodule, "list_texts", lambda: None)()
        probe = find_probe(pl_module, ConceptProbe)
        if listed is None or probe is None or probe.posterior_reads != "text":
            return
        # 1. every text, its concepts and its probability with and without each prompt
        data, (prompt, texts) = trainer.datamodule, listed
        rows = rows_of(prompt, texts, pl_module.device)
        rows |= signal_columns(data.signals(rows))
        codes = torch.unique(probe.concepts(rows).cpu(), dim=0, return_inverse=True)[1]
        reveals, counts = torch.unique(data.rows["test"].columns["reveal"], dim=0, return_counts=True)
        conditional = torch.stack(
            [data.distribution.log_prob(texts, one.expand(len(texts), -1)).exp() for one in reveals]
        )
        nothing = torch.full_like(reveals[:1], -1).expand(len(texts), -1)
        whole = data.distribution.log_prob(texts, nothing).exp()
        # 2. the best that these codes allow
        rate, gain = code_ceiling(whole, conditional, counts.double() / counts.sum(), codes)
        bits = {"rate_bits_best": rate / math.log(2), "gain_bits_best": gain / math.log(2)}
        pl_module.figures.add(bits | ({"efficiency_best": gain / rate} if rate > 0 else {}))
        # 3. what one forward pass must lose, whatever the executor
        lost = total_correlation_given(texts, whole, codes, until_end(texts, data.end_ids()))
        pl_module.figures.add({"total_correlation_given_plan": lost / texts.shape[1]})
        # 4. what the executor makes of them
        of_codes = torch.zeros(len(codes), dtype=whole.dtype).index_add_(0, codes, whole)
        least = float(entropy(whole) - entropy(of_codes)) / texts.shape[1]
        nll = in_parts(probe.nll, rows, probe.probe_batch(rows, Generator(device=pl_module.device)))
        found = float((nll.mean(-1).cpu().double() * whole).sum())
        pl_module.figures.add({"nll_enumerated": found, "nll_enumerated_best": least})


def rows_of(prompt: Tensor, texts: Tensor, device: Any) -> dict[str, Tensor]:
    """Rows of all texts (T, R), each after the same prompt (P,)."""
    ids = torch.cat([prompt.expand(len(texts), -1), texts], -1)
    response = torch.zeros_like(ids, dtype=torch.bool)
    response[:, len(prompt) :] = True
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(response), "response_mask": response}
    return {name: column.to(device) for name, column in rows.items()}
