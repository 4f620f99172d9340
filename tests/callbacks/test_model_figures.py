"""What callbacks find out of a model itself: what a probe reads, when a goal is reached, and how it is tabulated."""

import pytest
import torch
from helpers.causal import PackedStream, tiny_causal
from helpers.trainer import quiet_trainer
from lightning import LightningModule, Trainer

from callbacks.goal import TrainingGoal
from callbacks.plan_probe import PlanProbe
from datamodules.oracle.datamodule import OracleDataModule
from lightning_modules.pretrain import PretrainModule
from models.functional.probe import fit_ridge, probe_accuracy, standardise
from models.interfaces.figures import ModelFigures
from models.objectives.next_token import NextToken
from reporting.gather import frontier_markdown, frontier_rows, frontier_table
from reporting.table import split_rows


def test_ridge_is_the_minimum_of_its_loss():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (40,), generator=generator)
    weights = fit_ridge(states, labels, 2, ridge=0.1)

    def loss(w: torch.Tensor) -> torch.Tensor:
        error = states @ w[:-1] + w[-1] - torch.nn.functional.one_hot(labels, 2).double()
        return error.square().sum() + 0.1 * 40 * w[:-1].square().sum()

    (gradient,) = torch.autograd.grad(loss(weights.requires_grad_()), weights)
    assert gradient.abs().max() < 1e-10


def test_a_probe_reads_what_is_there_and_nothing_of_shuffled_labels():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2000,), generator=generator)
    directions = torch.randn(4, 8, generator=generator)
    states = directions[labels] + 0.1 * torch.randn(2000, 8, generator=generator)
    train, test = standardise(states[:1000], states[1000:])
    assert probe_accuracy(fit_ridge(train, labels[:1000], 4), test, labels[1000:]) > 0.99
    shuffled = labels[:1000][torch.randperm(1000, generator=generator)]
    assert probe_accuracy(fit_ridge(train, shuffled, 4), test, labels[1000:]) < 0.5


class Told(LightningModule):
    """A module whose last state is (or is not) the one-hot plan of the text."""

    def __init__(self, data: OracleDataModule, tells: bool) -> None:
        super().__init__()
        self.data, self.tells, self.figures = data, tells, ModelFigures()

    def states(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        plans = torch.nn.functional.one_hot(self.data.hidden_plans(rows), 16).flatten(1).float()
        noise = torch.randn(plans.shape, generator=torch.Generator().manual_seed(0))
        last = plans if self.tells else noise
        return torch.cat([noise.unsqueeze(1).expand(-1, rows["input_ids"].shape[1] - 1, -1), last.unsqueeze(1)], 1)


@pytest.mark.parametrize("tells", [True, False])
def test_the_plan_is_found_where_it_is(tells):
    data = OracleDataModule(size="tiny", train_rows=2000, val_rows=16, test_rows=1000)
    data.setup()
    trainer, module = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), Told(data, tells)
    trainer.datamodule = data
    probe = PlanProbe(rows=1000)
    probe.on_fit_start(trainer, module)
    again = PlanProbe(rows=1000)
    again.load_state_dict(probe.state_dict())
    again.on_test_start(trainer, module)
    figures = module.figures.values
    assert figures["probe_untrained"] == figures["probe"]  # nothing has been trained in between
    assert (figures["probe"] == 1.0) == tells
    assert (figures["probe"] < figures["probe_chance"] + 0.1) != tells
    assert figures["probe_shuffled"] < figures["probe_chance"] + 0.1
    truth = data.hidden_plans(data.rows["test"].columns)
    shown = data.rows["test"].columns["reveal"]
    assert torch.equal(truth[shown >= 0], shown[shown >= 0])  # the text tells what the prompt reveals


def test_a_goal_is_noted_once_and_only_when_it_is_reached():
    torch.manual_seed(0)
    data = PackedStream(sizes=(2, 3))
    found = {}
    for below in (100.0, 0.0):
        module = PretrainModule(tiny_causal(7), NextToken(), lr=1e-2, warmup_steps=1)
        goal = TrainingGoal(below)
        trainer = quiet_trainer(4, callbacks=[goal], val_check_interval=1)
        trainer.fit(module, data)
        again = TrainingGoal(below)
        again.load_state_dict(goal.state_dict())
        assert again.state_dict() == goal.state_dict()
        again.on_test_start(trainer, module)
        assert module.curve["steps"] == [1, 2, 3, 4]
        assert module.curve["tokens"][:2] == [2 * 6, 5 * 6]
        assert module.curve["nll"][-1] == pytest.approx(float(trainer.callback_metrics["val/nll"]))
        assert "nll_truth" not in module.curve  # this corpus does not know it
        found[below] = module.figures.values
    assert found[100.0]["goal_tokens"] == 2 * 6  # the first validation, after one batch
    assert 0 < found[100.0]["goal_seconds"] < found[100.0]["train_seconds"]
    assert found[100.0]["train_tokens"] == 2 * (2 + 3) * 6
    assert "goal_tokens" not in found[0.0]


def test_models_have_a_table_of_their_own():
    def row(method: str, **quality: float) -> dict:
        return {"method": method, "decoder": method, "nfe": 0, "quality": quality, "entropy": None, "cost": {}}

    record = {
        "experiment": "objectives/next_token",
        "seed": 0,
        "data": {"name": "oracle-small"},
        "rows": [row("teacher", validity=0.5), row("model", nll=0.25, nll_truth=0.24, probe=0.9, goal_tokens=4e5)],
    }
    assert [[r["method"] for r in part["rows"]] for part in split_rows(record)] == [["teacher"], ["model"]]
    other = {**record, "seed": 1, "rows": [row("model", nll=0.26, nll_truth=0.25, probe=0.8, goal_tokens=6e5)]}
    rows = [r for r in frontier_rows([record, other]) if r.method == "model"]
    text = frontier_markdown(rows)
    assert "| NLL | data NLL | above data | probe acc. | Mtok to goal |" in text
    assert "| 0.2550 ± 0.0635 | 0.2450 ± 0.0635 | 0.0100 ± 0.0000 |" in text  # the excess is taken seed by seed
    assert "0.50 ± 1.27" in text  # millions, and so is their interval
    assert "valid" not in text
    assert "TFLOP to goal" not in text  # nobody knows what was spent
    assert len(frontier_table(rows, width=200).columns) == 8
    spent = {**record, "rows": [row("model", goal_tokens=4e5, train_tokens=2e6, train_flops=5e12)]}
    assert "| 0.40 | 1.00 | 2.00 | 5.00 |" in frontier_markdown(frontier_rows([spent]))
    missed = {**record, "seed": 2, "rows": [row("model", nll=0.27, nll_truth=0.25, probe=0.8)]}
    rows = [r for r in frontier_rows([record, other, missed]) if r.method == "model"]
    assert "0.50 ± 1.27 (2 of 3)" in frontier_markdown(rows)
