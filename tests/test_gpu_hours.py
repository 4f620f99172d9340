"""The computed needs of an experiment against FLOPs that are counted, and against its configuration."""

import importlib

import pytest
import torch
from helpers.experiment import ROOT

from lightning_modules.noisy_mask_flow import STAGES, NoisyMaskFlowModule
from lightning_modules.training.flops import run_counted
from models.backbones.llada import build_llada
from models.diffusion.objective import MaskedDiffusion

ROWS, LENGTH = 16, 16
OPTIONS = {"target": "psd", "recent_texts": 0, "observed_share": 0.0, "ode_steps": 4, "pair_reuse": 4}
OPTIONS |= {"prompt_length": 1, "prompt_hidden_size": 4, "prompt_rank": 2}  # small beside the body, as at full size


@pytest.fixture
def needs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_hours")


@pytest.fixture
def body():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"mask_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    return build_llada(vocab_size=300, max_position_embeddings=LENGTH, rope_theta=1e4, **sizes, **ids)


@pytest.fixture
def batch():
    ids = torch.randint(3, 300, (ROWS, LENGTH))
    every = torch.ones_like(ids, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": every, "response_mask": every}


def shape_of(needs, body):
    c = body.config
    return needs.Shape(c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers)


@pytest.mark.parametrize("stage", STAGES)
def test_flops_of_a_students_step_are_those_that_are_counted(needs, body, batch, stage):
    module = NoisyMaskFlowModule(body, stages={stage: {"share": 1.0, "lr": 1e-3}}, **OPTIONS)
    torch.nn.init.normal_(module.student.mask_noise.weight, std=0.1)
    module.average = module.student.trainable()
    module.on_stage_begin(stage)
    steps = 2 * OPTIONS["pair_reuse"] if stage == "polish" else 1

    def train():
        for step in range(steps):
            module.stage_terms(stage, batch, 1.0, torch.Generator().manual_seed(step)).loss.backward()

    counted = run_counted(train)[1] / steps
    work = needs.passes(stage, module.options)
    assert needs.step_flops(shape_of(needs, body), LENGTH, ROWS, work) == pytest.approx(counted, rel=0.05)
    # and they would not be those of a step that only trains
    if stage != "adapt":
        assert needs.step_flops(shape_of(needs, body), LENGTH, ROWS, needs.Passes(1)) < 0.8 * counted


def test_flops_of_a_teachers_step_are_those_that_are_counted(needs, body, batch):
    objective, generator = MaskedDiffusion(), torch.Generator().manual_seed(0)
    counted = run_counted(lambda: [objective(body, batch, generator).loss.backward() for _ in range(4)])[1] / 4
    computed = needs.step_flops(shape_of(needs, body), LENGTH, ROWS, needs.Passes(1), needs.MASKED_AT_ONCE)
    assert computed == pytest.approx(counted, rel=0.05)


def test_the_recipe_of_lm1b_says_what_it_needs(needs, capsys, configure):
    cfg = configure("experiment=flow_lm1b")
    shape = needs.Shape(30_522, cfg.model.hidden_size, cfg.model.intermediate_size, cfg.model.num_hidden_layers)
    found = needs.needs(cfg, shape)
    assert [(name, steps) for name, steps, _ in found] == [
        ("teacher", 1_000_000), ("adapt", 150_000), ("flow", 50_000), ("polish", 300_000),
    ]  # fmt: skip
    needs.main(["experiment=flow_lm1b"])
    whole = capsys.readouterr().out
    assert "computed, not measured: 131,835,648 parameters" in whole
    assert "GB for the student (64 rows at once)" in whole
    needs.main(["--utilisation", "0.4", "experiment=flow_lm1b"])
    hours = [float(text.split("together")[1].split("│")[3]) for text in (whole, capsys.readouterr().out)]
    assert hours[1] == pytest.approx(hours[0] / 2, abs=1)
    with pytest.raises(SystemExit):
        needs.main(["experiment=flow_lm1b", "module=step_halving"])


def test_the_recipe_of_openwebtext_has_the_steps_of_lm1b_and_longer_rows(needs, capsys, configure):
    cfg, other = configure("experiment=flow_owt"), configure("experiment=flow_lm1b")
    assert cfg.data.batch_size * cfg.trainer.accumulate_grad_batches == 512
    assert (cfg.trainer.max_steps, cfg.teacher) == (other.trainer.max_steps, other.teacher)
    needs.main(["experiment=flow_owt"])
    said = capsys.readouterr().out
    assert "computed, not measured: 162,150,144 parameters" in said  # 2 x 50,258 x 768 of them are tables
    assert "GB for the student (16 rows at once)" in said
    with pytest.raises(SystemExit):
        needs.main(["experiment=flow_owt", "data.tokenizer=elsewhere"])
    assert "type --vocab-size N" in capsys.readouterr().err
    needs.main(["experiment=flow_owt", "data.tokenizer=elsewhere", "--vocab-size", "50258"])
    assert capsys.readouterr().out == said
