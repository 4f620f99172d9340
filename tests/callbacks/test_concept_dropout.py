"""The curve rises on a model whose plans are used, lies flat on one that ignores them, and leaves table, figure and record."""

import json

import pytest
import torch
from helpers.concept import only_few
from helpers.concept import two_type_module as module_of
from helpers.trainer import quiet_trainer

from callbacks.concept_dropout import ConceptDropout
from callbacks.frontier import FrontierReport


@pytest.mark.slow
def test_hiding_concepts_costs_more_and_more_where_they_are_used(tmp_path, tiny_oracle, capsys):
    only_few(tiny_oracle)
    module = module_of(tiny_oracle, 4)
    dropout = ConceptDropout(tmp_path, rows=64, steps=5)
    trainer = quiet_trainer(120, callbacks=[dropout, FrontierReport(tmp_path, "concept_dropout", {})])
    trainer.fit(module, tiny_oracle)
    trainer.test(module, tiny_oracle, verbose=False)
    percents, nll, _, rebuilt = zip(*dropout.curve(trainer, module), strict=True)
    assert percents == (0, 20, 40, 60, 80, 100)
    assert list(nll) == sorted(set(nll))  # each step dearer than the one before
    assert nll[-1] > nll[0] + 0.3
    assert list(rebuilt) == sorted(rebuilt, reverse=True)
    assert rebuilt[0] == 1
    assert rebuilt[-1] <= 0.5
    (row,) = (r for r in json.loads((tmp_path / "record.json").read_text())["rows"] if r["method"] == "model")
    assert row["quality"]["nll_dropped_100"] == pytest.approx(nll[-1])
    assert row["quality"]["reconstruction_dropped_0"] == 1
    assert (tmp_path / "concept_dropout.png").stat().st_size > 1000
    assert "100 %" in capsys.readouterr().out


def test_the_curve_of_a_model_that_ignores_its_plans_is_flat(tmp_path, tiny_oracle):
    module = module_of(tiny_oracle, 4)
    # every text is written from the same plan
    module.probe.block = lambda batch: module.planner.block(torch.ones_like(batch.condition["choices"]))
    dropout = ConceptDropout(tmp_path, rows=16, steps=4)
    trainer = quiet_trainer(1, callbacks=[dropout])
    trainer.test(module, tiny_oracle, verbose=False)
    _, nll, _, _ = zip(*dropout.curve(trainer, module), strict=True)
    assert max(nll) == pytest.approx(min(nll))
