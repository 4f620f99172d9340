"""Which slot found which attribute, on slots that copy attributes, and on slots that say nothing."""

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule

from callbacks.slot_table import SlotTable, nmi_table
from datamodules.slot_values import slot_values
from models.interfaces.figures import ModelFigures

NAMES = ["area", "food", "price"]


class FixedConcepts:
    """A probe of three slots; only its concepts are asked for."""

    posterior_reads, slot_names = "text", ("a1", "a2", "b")

    def unused(self, *_):
        raise AssertionError

    probe_batch = nll = corrupt_condition = condition_features = concepts = posterior_concepts = unused


class Slots(LightningModule):
    def __init__(self, concepts: torch.Tensor) -> None:
        super().__init__()
        self.concepts, self.figures = concepts, ModelFigures()
        probe = FixedConcepts()
        probe.posterior_concepts = self.posterior_concepts
        self.probes = (probe,)

    def posterior_concepts(self, rows: dict) -> torch.Tensor:
        return self.concepts[rows["row"]]


def table_of(concepts, values, capsys) -> tuple[dict, str]:
    data = SimpleNamespace(attributes_of=lambda rows: values[rows["row"]], attribute_names=NAMES)
    trainer, module, callback = (
        SimpleNamespace(datamodule=data, is_global_zero=True, loggers=[]),
        Slots(concepts),
        SlotTable(),
    )
    callback.on_test_start(trainer, module)
    for rows in torch.arange(len(values)).split(32):
        callback.on_test_batch_end(trainer, module, None, {"row": rows}, 0)
    callback.on_test_epoch_end(trainer, module)
    return module.figures.values, capsys.readouterr().out


def test_each_slot_is_matched_to_what_it_copies(capsys):
    values = torch.randint(0, 4, (256, 3), generator=torch.Generator().manual_seed(0))
    renamed = (values[:, [2, 0, 1]] + 1) % 4  # another order, other numbers
    found, printed = table_of(renamed, values, capsys)
    assert found == pytest.approx({"nmi_price": 1.0, "nmi_area": 1.0, "nmi_food": 1.0})
    rows = {
        line.split()[0]: line.split()[1:]
        for line in printed.splitlines()
        if line.split()[:1] and line.split()[0] in FixedConcepts.slot_names
    }
    assert [rows[slot].index("1.000*") for slot in FixedConcepts.slot_names] == [2, 0, 1]


def test_slots_that_say_nothing_have_what_chance_gives(capsys):
    generator = torch.Generator().manual_seed(0)
    values, concepts = (torch.randint(0, 4, (256, 3), generator=generator) for _ in range(2))
    found, printed = table_of(concepts, values, capsys)
    assert max(found.values()) < 0.05
    assert "at most by chance" in printed
    assert nmi_table(torch.zeros_like(concepts), values).max() == 0


def test_slots_of_prompts_are_numbered():
    rows = [{"food": "French", "area": "city"}, {"food": "Thai"}, {"area": "city", "food": "French"}]
    names, table = slot_values(rows)
    assert names == ["area", "food"]
    assert table.tolist() == [[1, 1], [0, 2], [1, 1]]
    assert slot_values([*rows, None]) is None
    assert slot_values([]) is None
