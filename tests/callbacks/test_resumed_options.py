"""Options that a resumed run cannot follow are named, with the value that counts."""

import pytest
import torch
from helpers.monitors import SixRows, Watched
from helpers.trainer import quiet_trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.resumed_options import ResumedOptions
from models.functional.errors import UsageError

BEFORE = {"module.lr": 0.002, "seed": 0, "data.batch_size": 16, "module.stages.flow.lr": 0.1}


def resumed(checkpoint: dict, capsys, max_steps: int = 9, **changes) -> tuple[ResumedOptions, str]:
    callback = ResumedOptions(BEFORE | {name.replace("__", "."): value for name, value in changes.items()})
    trainer = quiet_trainer(max_steps)
    trainer.state.fn = TrainerFn.FITTING
    callback.on_load_checkpoint(trainer, None, {"global_step": 6} | checkpoint)
    return callback, capsys.readouterr().out


def test_the_checkpoint_s_learning_rate_counts_and_is_written_on(capsys):
    callback, said = resumed({"options": BEFORE}, capsys, module__lr=0.05)
    assert "so module.lr=0.002 (not 0.05) counts" in said
    assert "from here on" not in said
    written = {}
    callback.on_save_checkpoint(None, None, written)
    assert written["options"] == BEFORE


def test_what_counts_from_here_on(capsys):
    callback, said = resumed({"options": BEFORE}, capsys, seed=1, data__batch_size=8)
    assert "from here on seed=1 (was 0), data.batch_size=8 (was 16) counts" in said
    assert "optimiser's state" not in said
    assert "seed=null (was 0)" in resumed({"options": BEFORE}, capsys, seed=None)[1]
    assert callback.options["seed"] == 1


def test_nothing_is_said_where_nothing_changes_or_nothing_is_known(capsys):
    assert resumed({"options": BEFORE}, capsys)[1] == ""
    assert resumed({}, capsys, module__lr=0.05)[1] == ""


def test_an_older_checkpoint_knows_the_module_s_learning_rate(capsys):
    assert "module.lr=0.002 (not 0.05)" in resumed({"hyper_parameters": {"lr": 0.002}}, capsys, module__lr=0.05)[1]


def test_stages_do_not_change(capsys):
    with pytest.raises(UsageError, match=r"type module\.stages\.flow\.lr=0\.1 to go on"):
        resumed({"options": BEFORE}, capsys, module__stages__flow__lr=0.2)


@pytest.mark.parametrize(
    ("more", "advice"), [({}, "trainer.max_steps=<more than 6> to go on"), ({"stages": {}}, "type student_path=")]
)
def test_a_finished_run_says_so(capsys, more, advice):
    said = resumed({"options": BEFORE, **more}, capsys, max_steps=6)[1]
    assert "the run is at its last step, 6; nothing is trained" in said
    assert advice in said


def test_options_travel_in_the_checkpoint_as_plain_values(tmp_path, capsys):
    trainer = quiet_trainer(2, callbacks=[ResumedOptions(BEFORE)])
    trainer.fit(Watched(), SixRows())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["options"] == BEFORE
    changed = quiet_trainer(4, callbacks=[ResumedOptions(BEFORE | {"seed": 5})])
    changed.fit(Watched(), SixRows(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert "seed=5 (was 0)" in capsys.readouterr().out
