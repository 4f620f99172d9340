"""How well texts are reconstructed from their plans, with teacher forcing and with the executor running freely."""

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Generator
from torchmetrics.functional.text import sacre_bleu_score

from callbacks.monitors.rows import first_rows, in_parts
from models.functional.errors import require_at_least
from models.interfaces.probes import RebuildProbe, find_probe
from reporting.console import report_console

HOW = ("teacher_forced", "free_running")


class Rebuilt(Callback):
    """Of the first `rows` test texts, from their most probable plans; figures for the record.

    token_accuracy_teacher_forced, token_accuracy_free_running: share of the tokens, up to the first end, that are right at
    their position. A text is right as a whole in both ways or in neither; they differ in what follows a wrong token.
    bleu_teacher_forced, bleu_free_running: SacreBLEU, 0..100, with each text's own wording as the only reference.
    """

    def __init__(self, rows: int = 512) -> None:
        require_at_least(1, callbacks__rebuilt__rows=rows)
        self.rows = rows

    @torch.no_grad()
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        probe = find_probe(pl_module, RebuildProbe)
        if probe is None or not hasattr(trainer.datamodule, "rows"):
            return
        rows = first_rows(trainer, pl_module, "test", self.rows)
        batch = probe.probe_batch(rows, Generator(device=pl_module.device).manual_seed(0))
        found = in_parts(probe.predictions, rows, batch)
        decode = trainer.datamodule.decode_responses
        figures, texts = {}, [[text] for text in decode(batch.text)]
        for how, own in zip(HOW, found.unbind(1), strict=True):
            right = (own == batch.text) & batch.counts
            figures[f"token_accuracy_{how}"] = float(right.sum() / batch.counts.sum())
            figures[f"bleu_{how}"] = 100 * sacre_bleu_score(decode(own), texts).item()
        pl_module.figures.add(figures)
        if trainer.is_global_zero:
            shown = ", ".join(
                f"{how.replace('_', ' ')}: token accuracy {figures[f'token_accuracy_{how}']:.3f}, "
                f"BLEU {figures[f'bleu_{how}']:.1f}"
                for how in HOW
            )
            report_console().print(f"\nreconstructed from plans, {shown}", highlight=False, soft_wrap=True)
