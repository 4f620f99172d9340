"""A training of concepts of several levels: every level learns, is searched, resumed and measured; one level is as before."""

import math

import pytest
import torch
from helpers.concept import batch_of, build_planner_executor, log_prob, only_few
from helpers.trainer import Losses, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from app import modes
from callbacks.ema import TrainableEMA
from models.plans.rows import posterior_input, prompt_of
from reporting.console import sentence_for
from reporting.record import read_record

TYPES = {"a": {"codes": 4, "most": 1, "levels": 2}, "b": {"codes": 2, "most": 2}}
OPTIONS = {
    "types": TYPES,
    "sampler": "ema_vq",
    "planning": {"prior": "sequential", "posterior": "slots"},
    "posterior_reads": "text",
    "signals": None,
    "quota": None,
    "quantise": (0.0, 0.2),
    "search": {"begin": 0.5, "interval": 2},
    "weights": {"text": 1.0, "planner": 1.0, "posterior": 1.0, "bag": 1.0, "commitment": 0.25, "usage": 1.0},
}


def build(data, **changes):
    return build_planner_executor(data, **OPTIONS | changes)


def test_one_level_is_what_a_type_without_the_option_has(tiny_oracle):
    found = []
    for levels in ({}, {"levels": 1}):
        module, losses = build(tiny_oracle, types={"a": {"codes": 4} | levels}), Losses()
        quiet_trainer(6, callbacks=[losses]).fit(module, tiny_oracle)
        found.append((losses.seen, module.state_dict()))
    (seen, state), (seen_too, state_too) = found
    assert seen == seen_too
    assert state.keys() == state_too.keys()
    assert all(torch.equal(value, state_too[name]) for name, value in state.items())


def test_resumed_is_uninterrupted(tmp_path, tiny_oracle):
    """Weights, codes of every level, cached plans and losses; stopped once before and once within the phase of searches."""
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole, first = build(tiny_oracle), Losses()
    callbacks = [TrainableEMA(0.9), keep, first]
    quiet_trainer(12, callbacks=callbacks, enable_checkpointing=True).fit(whole, tiny_oracle)
    for step in (4, 8):
        resumed, second = build(tiny_oracle), Losses()
        trainer = quiet_trainer(12, callbacks=[TrainableEMA(0.9), second])
        trainer.fit(resumed, tiny_oracle, ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert second.seen == first.seen[step:]
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        assert torch.equal(whole.em.cache.choices, resumed.em.cache.choices)
    codes = whole.model.quantiser.spaces[0].codes
    assert codes.shape == (8, 8)
    assert len(torch.unique(codes, dim=0)) == 8
    assert set(whole.em.cache.choices[:, 1].tolist()) > {1}  # finer codes were found by search


def test_figures_and_record_count_every_level(tmp_path, tiny_oracle):
    """The rate is that of four choices, and a greedy plan has four forward passes."""
    module = build(tiny_oracle)
    quiet_trainer(4).fit(module, tiny_oracle)
    (found,) = quiet_trainer(1).validate(module, tiny_oracle, verbose=False)
    rows = tiny_oracle.rows["val"].columns
    with torch.no_grad():
        choices = module.source.most_probable(rows).choices
        log_p = module.planner.score(*prompt_of(rows), choices).log_softmax(-1)
    bits = -log_p.gather(-1, choices.unsqueeze(-1)).squeeze(-1).mean(0) / math.log(2)
    assert found["val/rate_bits"] == pytest.approx(float(bits.sum()), rel=1e-4)
    assert bits[:2].min() > 0.1
    assert module.decoders()[0].forwards == 4 + tiny_oracle.response_length
    assert module.probe.slot_names == ["a.1", "a.2", "b1", "b2"]


def test_the_posterior_learns_the_finer_codes_that_were_found_given_the_coarser_ones(tiny_oracle):
    """The loss of a step of hard EM is -log q of the cached plans, under the weights before the step."""
    options = {"sampler": "fsq", "search": {"begin": 0.0, "explore": 1.0}, "weights": {"posterior": 1.0}}
    trained, fresh, losses = build(tiny_oracle, **options), build(tiny_oracle, **options), Losses()
    quiet_trainer(1, callbacks=[losses]).fit(trained, tiny_oracle)
    rows = (trained.em.cache.found >= 0).nonzero().flatten()
    batch = {name: column[rows] for name, column in tiny_oracle.rows["train"].columns.items()}
    choices = trained.em.cache.get(rows)
    assert len(rows) == tiny_oracle.batch_size
    assert (choices[:, 0] > 1).any()
    nll = -log_prob(fresh.posterior, *posterior_input(batch, "text"), choices)
    assert losses.seen[0] == pytest.approx(float(nll.mean()) / tiny_oracle.response_length, rel=1e-4)


@pytest.mark.slow
def test_plans_of_two_levels_are_learned_and_used(tiny_oracle):
    """Four texts and two codes a level: only both levels together tell them apart."""
    only_few(tiny_oracle)
    weights = OPTIONS["weights"] | {"commitment": 0.0, "usage": (1.0, 0.0)}
    options = {"lr": 1e-2, "quantise": (0.2, 0.5), "search": {"begin": 0.6, "interval": 5, "explore": 0.5}}
    module = build(tiny_oracle, types={"a": {"codes": 2, "levels": 2}}, weights=weights, **options)
    trainer = quiet_trainer(160)
    trainer.fit(module, tiny_oracle)
    (found,) = trainer.validate(module, tiny_oracle, verbose=False)
    assert found["val/reconstruction"] == 1
    plans = module.source.most_probable(batch_of(tiny_oracle)).choices
    assert len(torch.unique(plans, dim=0)) == 4
    assert len(torch.unique(plans[:, :1], dim=0)) == 2  # the control: the coarse codes alone do not


LEVELS = ["experiment=concept_oracle", "data.size=tiny", "module.types.a.levels=2", "module.types.a.codes=4"]


def test_an_experiment_runs_every_stage_with_levels(configure, tmp_path):
    small = ["data.train_rows=64", "data.val_rows=8", "data.test_rows=8", "data.batch_size=8", "data.eval_batch_size=8"]
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2", "module.search.begin=0.5", "logger=none"]
    modes.fit(configure(*LEVELS, *small, *steps))
    (record,) = tmp_path.rglob("record.json")
    rows = {row["decoder"]: row for row in read_record(record)["rows"]}
    assert rows["plan greedy, text greedy"]["nfe"] == 5 + 6


def test_an_experiment_refuses_levels_before_it_trains(configure):
    for option in ("module.sampler=gumbel_st", "module.planning.posterior=sequential"):
        with pytest.raises(Exception, match=r"UsageError\(.module\.types\.a\.levels=2") as caught:
            modes.fit(configure(*LEVELS, option, "trainer.fast_dev_run=true"))
        assert sentence_for(caught.value).startswith("module.types.a.levels=2")
