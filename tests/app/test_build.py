"""The trainer of a configuration."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from lightning import Trainer

from app.build import data_of, load_teacher, make_trainer, training_options
from callbacks.interruption import StopOnSignal
from lightning_modules.training.checkpoints import ReplacingCheckpointIO
from models.diffusion.block_diffusion import BlockDiffusion
from models.functional.errors import UsageError


@pytest.mark.parametrize(("typed", "given"), [("4", 32), ("'00:10:00:00'", "00:10:00:00"), ("0.5", 0.5)])
def test_validation_counts_optimiser_steps_or_a_time(configure, monkeypatch, typed, given):
    asked = {}
    monkeypatch.setattr("app.build.instantiate", lambda node, **options: asked.update(options) or Trainer())
    options = ["trainer.accumulate_grad_batches=8", f"trainer.val_check_interval={typed}"]
    cfg = configure("experiment=objectives", *options)
    make_trainer(cfg, [], False)
    assert asked.get("val_check_interval", cfg.trainer.val_check_interval) == given


def test_every_trainer_saves_whole_files_and_stops_on_signals(configure):
    trainer = make_trainer(configure("experiment=objectives", "trainer.accelerator=cpu"), [], False)
    assert any(isinstance(callback, StopOnSignal) for callback in trainer.callbacks)
    assert isinstance(trainer.strategy.checkpoint_io, ReplacingCheckpointIO)


def test_options_of_a_training(configure):
    options = training_options(configure("experiment=objectives", "module.lr=0.5", "seed=3"))
    assert options["module.lr"] == 0.5
    assert options["seed"] == 3
    assert options["trainer.precision"] == "32-true"
    assert options["callbacks.ema.decay"] == configure("experiment=objectives").callbacks.ema.decay
    assert training_options(configure("experiment=objectives", "callbacks.ema=null"))["callbacks.ema.decay"] is None
    assert not {"trainer.max_steps", "module.seed", "module.forwards", "data.num_workers"} & options.keys()


def test_a_model_of_block_diffusion_is_no_teacher(tiny_llada, tiny_oracle, tmp_path):
    model = tiny_llada(**tiny_oracle.special_ids())
    model.save_pretrained(tmp_path / "masked")
    assert not load_teacher(tmp_path / "masked", tiny_oracle).config.block_causal
    BlockDiffusion(2).attach(model)
    model.save_pretrained(tmp_path / "blocks")
    with pytest.raises(UsageError, match=r"blocks was trained by block diffusion.* type teacher\.path="):
        load_teacher(tmp_path / "blocks", tiny_oracle)


def test_the_newest_run_is_named_by_its_own_weights_alone(configure, tmp_path, monkeypatch, capsys):
    """Not by the teacher of teacher.path=, which is of another run."""
    for name in ("now", "then"):
        (tmp_path / f"{name}.jsonl").touch()
    state = SimpleNamespace(folder=tmp_path / "run" / "data", sources={"train": [str(tmp_path / "then.jsonl")]})
    data = MagicMock(sources={"train": str(tmp_path / "now.jsonl")})
    monkeypatch.setattr("app.build.instantiate", lambda *_, **__: data)
    known = {tmp_path / "run" / "student": state, tmp_path / "teacher": state}
    monkeypatch.setattr("app.build.corpus_state", lambda weights, _: known.get(weights))
    options = ["experiment=meanflow_llada", f"teacher.path={tmp_path}/teacher"]

    def said(weights, *more):
        data_of(configure(*options, *more), weights)
        return capsys.readouterr().err

    assert f"this is the model of {tmp_path}/run, the newest run" in said(tmp_path / "run" / "student", "mode=generate")
    assert said(None, "mode=generate", "decoder=teacher") == ""
    assert said(tmp_path / "run" / "student", "mode=generate", "student_path=x") == ""
    assert said(tmp_path / "run" / "student", "mode=test") == ""
