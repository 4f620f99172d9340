"""Normalised mutual information (NMI) of concept slots and attributes of texts: a table at the end of a test."""

import torch
from lightning import Callback, LightningModule, Trainer
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.functional.clustering import normalized_mutual_info_score

from models.functional.ranks import gathered
from models.interfaces.probes import ConceptProbe, find_probe
from reporting.console import report_console
from reporting.slots import slot_lines, slot_markdown, slot_table


class SlotTable(Callback):
    """NMI of each slot with each attribute that the corpus knows of its texts, (S, A), over the test texts of all ranks.

    A star marks the attribute that a slot is matched to, one to one, so that the sum is largest (Hungarian). `nmi_<attribute>`
    in the record: of the slot matched to it. A pair of variables with few values has a little NMI by chance: `by chance` is the
    largest of the same table with the texts shuffled.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._parts = []

    @torch.no_grad()
    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        values_of = getattr(trainer.datamodule, "attributes_of", None)
        probe = find_probe(pl_module, ConceptProbe)
        if values_of is None or probe is None:
            return
        values = values_of(batch)
        if values is not None:
            self._parts.append((probe.posterior_concepts(batch).cpu(), values.cpu()))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._parts:
            return
        own = {name: torch.cat(column) for name, column in zip("cv", zip(*self._parts, strict=True), strict=True)}
        columns = gathered(own)
        order = torch.randperm(len(columns["c"]), generator=torch.Generator().manual_seed(0))
        table, shuffled = nmi_table(columns["c"], columns["v"]), nmi_table(columns["c"], columns["v"][order])
        matched = dict(zip(*(part.tolist() for part in linear_sum_assignment(table, maximize=True)), strict=True))
        names = list(trainer.datamodule.attribute_names)
        pl_module.figures.add({f"nmi_{names[a]}": float(table[s, a]) for s, a in matched.items()})
        if not trainer.is_global_zero:
            return
        lines = slot_lines(find_probe(pl_module, ConceptProbe).slot_names, table, matched)
        title = f"NMI of concept slots and attributes ({float(shuffled.max()):.3f} at most by chance)"
        console = report_console()
        console.print(f"\n{title}", highlight=False)
        console.print(slot_table(names, lines))
        text = slot_markdown(names, lines)
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                logger.experiment.add_text("slots", f"{title}\n\n{text}", trainer.global_step)


def nmi_table(concepts: Tensor, values: Tensor) -> Tensor:
    """(S, A) from choices (N, S) and attributes (N, A); 0 where one of the two never changes."""
    table = torch.zeros(concepts.shape[1], values.shape[1])
    for s, own in enumerate(concepts.unbind(-1)):
        for a, known in enumerate(values.unbind(-1)):
            if own.min() < own.max() and known.min() < known.max():
                table[s, a] = float(normalized_mutual_info_score(own, known))
    return table
