"""How well texts are rebuilt from their plans, the executor reading its own words, beside what it says after the text's own."""

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Generator
from torchmetrics.functional.text import sacre_bleu_score

from callbacks.monitors.rows import first_rows, in_parts
from models.interfaces.probes import RebuildProbe, find_probe
from reporting.console import report_console

HOW = ("forced", "free")


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
        probe = find_probe(pl_module, RebuildProbe)
        if probe is None or not hasattr(trainer.datamodule, "rows"):
            return
        rows = first_rows(trainer, pl_module, "test", self.rows)
        batch = probe.probe_batch(rows, Generator(device=pl_module.device).manual_seed(0))
        said = in_parts(probe.predictions, rows, batch)
        decode = trainer.datamodule.decode_responses
        figures, texts = {}, [[text] for text in decode(batch.text)]
        for how, own in zip(HOW, said.unbind(1), strict=True):
            right = (own == batch.text) & batch.counts
            figures[f"token_accuracy_{how}"] = float(right.sum() / batch.counts.sum())
            figures[f"bleu_{how}"] = 100 * sacre_bleu_score(decode(own), texts).item()
        pl_module.figures.add(figures)
        if trainer.is_global_zero:
            shown = ", ".join(
                f"{how}: {figures[f'token_accuracy_{how}']:.3f} of the words, BLEU {figures[f'bleu_{how}']:.1f}"
                for how in HOW
            )
            report_console().print(f"\nrebuilt from plans, {shown}", highlight=False, soft_wrap=True)
