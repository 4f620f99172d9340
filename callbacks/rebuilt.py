"""How well texts are rebuilt from their plans, the executor reading its own words, beside what it says after the text's own."""

from typing import Protocol, runtime_checkable

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Generator, Tensor
from torchmetrics.functional.text import sacre_bleu_score

from callbacks.monitors.rows import first_rows, in_parts
from models.interfaces.probe_batch import Given
from reporting.console import report_console

HOW = ("forced", "free")


@runtime_checkable
class Rebuilds(Protocol):
    """Writes texts from plans; see `models.interfaces.probes`."""

    def probe(self, rows: dict[str, Tensor], generator: Generator) -> Given: ...

    def probe_said(self, rows: dict[str, Tensor], given: Given) -> Tensor:
        """(B, 2, R): the likeliest word at each place after the text's own words (forced), and after its own (free)."""


class Rebuilt(Callback):
    """Of the first `rows` test texts, from their most probable plans; figures for the record.

    token_accuracy_forced, token_accuracy_free: share of the words, up to the first end, that stand at their place. A text is
    rebuilt exactly in the one way where it is in the other; what differs is how much is right where one word is not.
    bleu_forced, bleu_free: SacreBLEU, 0..100, each text's own wording the only reference.
    """

    def __init__(self, rows: int = 512) -> None:
        self.rows = rows

    @torch.no_grad()
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, Rebuilds) or not hasattr(trainer.datamodule, "rows"):
            return
        rows = first_rows(trainer, pl_module, "test", self.rows)
        given = pl_module.probe(rows, Generator(device=pl_module.device).manual_seed(0))
        said = in_parts(pl_module.probe_said, rows, given)
        decode = trainer.datamodule.decode_responses
        figures, texts = {}, [[text] for text in decode(given.text)]
        for how, own in zip(HOW, said.unbind(1), strict=True):
            right = (own == given.text) & given.counts
            figures[f"token_accuracy_{how}"] = float(right.sum() / given.counts.sum())
            figures[f"bleu_{how}"] = 100 * sacre_bleu_score(decode(own), texts).item()
        pl_module.figures |= figures
        if trainer.is_global_zero:
            shown = ", ".join(
                f"{how}: {figures[f'token_accuracy_{how}']:.3f} of the words, BLEU {figures[f'bleu_{how}']:.1f}"
                for how in HOW
            )
            report_console().print(f"\nrebuilt from plans, {shown}", highlight=False, soft_wrap=True)
