"""The computed budget against models that exist: its parameters, and how often a step multiplies by frozen weights."""

import sys

import pytest
import torch

import models.backbones.frozen_layers as layers
from benchmarks import cluster_budget
from benchmarks.cluster_budget import GATHERS, Shape, distillation, received, training
from lightning_modules.logit_flow import LogitFlowModule
from lightning_modules.noisy_mask_flow import NoisyMaskFlowModule
from lightning_modules.step_halving import StepHalvingModule
from models.backbones.llada import LladaModel
from models.backbones.sharded_layers import frozen_linears
from models.backbones.twin import with_lora
from models.functional.weights import trainable_weights

SHAPE = Shape(vocab_size=50, width=128, feed_forward=192, layers=2)
SMALL = {"prompt_length": 3, "prompt_hidden_size": 8, "prompt_rank": 4}
NOISY = {name: {"share": 1 / 3, "lr": 1e-2} for name in ("adapt", "flow", "polish")}


def test_parameters_are_those_of_the_model():
    model = LladaModel(SHAPE.config())
    assert SHAPE.whole == sum(p.numel() for p in model.parameters())
    assert SHAPE.linear == sum(p.weight.numel() for p in model.modules() if isinstance(p, torch.nn.Linear))
    model.requires_grad_(False)
    assert SHAPE.lora(3) == sum(p.numel() for p in trainable_weights(with_lora(model, 3)).values())


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("noisy mask, adapt", "adapt"),
        ("noisy mask, flow (psd)", "flow"),
        ("noisy mask, flow (meanflow)", "flow"),
        ("noisy mask, polish", "polish"),
        ("logit flow", None),
        ("step halving", "to_2"),
    ],
)
def test_a_step_multiplies_by_frozen_weights_as_often_as_is_said(tiny_llada, tiny_oracle, monkeypatch, kind, stage):
    ids = tiny_oracle.tokenizer
    special = {name: getattr(ids, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    teacher, batch = tiny_llada(len(ids), **special), next(iter(tiny_oracle.train_dataloader()))
    if kind == "logit flow":
        module = LogitFlowModule(teacher, **SMALL)
        module.log = lambda *_, **__: None
        step = lambda: module._step(batch, torch.Generator().manual_seed(0), "train")  # noqa: E731
    else:
        if kind == "step halving":
            module = StepHalvingModule(teacher, start_forwards=4, adapter="lora")
        else:
            target = "meanflow" if "meanflow" in kind else "psd"
            module = NoisyMaskFlowModule(teacher, stages=NOISY, adapter="lora", target=target, **SMALL)
        module.average = module.student.trainable()
        module.on_stage_begin("to_2" if kind == "step halving" else "adapt")
        module.denoiser = module.student.trainable()
        step = lambda: module.stage_terms(stage, batch, 1.0, torch.Generator().manual_seed(0)).loss  # noqa: E731
    linears = len({id(layer.weight) for layer in frozen_linears(module)})
    uses, own = [], layers.full_tensor
    monkeypatch.setattr(layers, "full_tensor", lambda weight: uses.append(1) or own(weight))
    steps = 4 if stage == "polish" else 1
    for _ in range(steps):
        step().backward()
    # where nothing before the first layer trains, its q, k and v take no part in backward passes
    unneeded = 0 if "noisy mask" in kind else 3 * GATHERS[kind][2]
    assert len(uses) / steps == sum(GATHERS[kind]) * linears - unneeded


def test_more_ranks_hold_less_and_one_receives_nothing():
    assert received(100.0, 1) == 0
    assert received(100.0, 4) == 75
    few, many = (distillation(SHAPE, ranks, True, "logit flow", 4, 2, 16) for ranks in (2, 8))
    assert many.weights < few.weights
    assert many.gradients == few.gradients
    assert (
        training(SHAPE, 8, True, 4, 2, 16, False).optimiser * 8 == training(SHAPE, 8, False, 4, 2, 16, False).optimiser
    )
    kept, again = (training(SHAPE, 8, True, 4, 2, 16, recompute).activations for recompute in (False, True))
    assert again < kept


def test_the_table_says_that_it_is_computed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cluster_budget", "--ranks", "4", "--layers", "2", "--width", "256"])
    cluster_budget.main()
    assert "computed, not measured" in capsys.readouterr().out
