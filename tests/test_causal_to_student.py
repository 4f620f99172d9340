"""From a pretrained causal LM to a few-step student, through whole runs: a teacher is made, each method learns from it."""

import json

import pytest
import torch
from helpers.daily import daily
from helpers.dream import write_dream
from helpers.foreign import foreign_model, foreign_tokenizer, save_foreign
from safetensors.torch import load_file

from app import modes
from models.functional.errors import UsageError

FAST = ["trainer.accelerator=cpu", "logger=none", "data.batch_size=8", "data.eval_batch_size=8"]
SHAPE = ["data.prompt_length=16", "data.response_length=8", "data.max_test_rows=8"]
# the student's options that make it small
METHODS = {
    "noisy_mask_flow_causal": [
        "module.lora_rank=2",
        "module.student_forwards=[1,2]",
        "module.ode_steps=2",
        "module.ode_forwards=[2]",
    ],
    "noisy_mask_flow": ["module.student_forwards=[1,2]", "module.ode_steps=2", "module.ode_forwards=[2]"],
    "step_halving": ["module.start_forwards=4", "module.student_forwards=[1,2]"],
    "logit_flow": [],
}


@pytest.fixture
def corpus(tmp_path):
    # prompts of two lengths: batches of like length have fewer columns
    rows = [{"prompt": f"{'jump' if k % 2 else 'jump on'} {k}", "response": f"up {k}"} for k in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return [*FAST, *SHAPE, *(f"data.{split}={tmp_path}/rows.jsonl" for split in ("train", "val", "test"))]


@pytest.fixture
def teacher(configure, corpus, tmp_path):
    """The model/ folder of a short run of masked_from_causal."""
    folder = save_foreign(tmp_path / "causal", foreign_model("llama"), foreign_tokenizer())
    own = [f"model.path={folder}", "model.mask_token='<extra_260>'", "model.lora_rank=2", "module.forwards=[1,2]"]
    run = tmp_path / "out" / "masked_from_causal" / "run"
    modes.fit(configure("experiment=masked_from_causal", *corpus, *own, "trainer.max_steps=2", f"paths.run_dir={run}"))
    return run / "model"


@pytest.mark.parametrize("method", daily(METHODS, "noisy_mask_flow_causal"))
def test_a_teacher_made_from_a_causal_model_has_a_student_of_every_method(
    configure, corpus, teacher, tmp_path, capsys, method
):
    typed = [
        "experiment=meanflow_from_causal",
        f"module={method}",
        f"teacher.path={teacher}",
        *corpus,
        *METHODS[method],
        "module.forwards=[1,2]",
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
    ]
    before = load_file(teacher / "causal" / "model.safetensors")
    run = tmp_path / "out" / "meanflow_from_causal" / "run"
    modes.fit(configure(*typed, f"paths.run_dir={run}"))
    assert all(torch.equal(w, before[name]) for name, w in load_file(teacher / "causal" / "model.safetensors").items())
    found = json.loads((run / "record.json").read_text())["rows"]
    passes = {row["nfe"] for row in found if row["method"] == "student"}
    assert passes >= ({1, 2} if method != "logit_flow" else {1})
    of_teacher = [row for row in found if row["method"] == "teacher"]
    assert {row["nfe"] for row in of_teacher if "confidence" not in row["decoder"]} == {1, 2}
    assert sum("confidence" in row["decoder"] for row in of_teacher) == 1
    ask = [*typed, "mode=generate", "prompt='jump 3'", "temperature=0"]
    capsys.readouterr()
    modes.generate(configure(*ask))
    first = capsys.readouterr().out
    assert "jump 3 →" in first
    # the student with its teacher, in a folder of its own
    modes.export(configure(*typed, "mode=export", f"paths.run_dir={tmp_path}/out/meanflow_from_causal/exported"))
    whole = tmp_path / "out" / "meanflow_from_causal" / "exported" / "model"
    assert (whole / "teacher" / "mask.safetensors").is_file()
    capsys.readouterr()
    modes.generate(configure(*ask, f"student_path={whole}"))
    assert capsys.readouterr().out.splitlines()[-1] == first.splitlines()[-1]


def test_a_published_dream_is_a_teacher(configure, corpus, tmp_path, capsys):
    folder = write_dream(tmp_path / "dream")
    typed = ["experiment=meanflow_from_causal", f"teacher.path={folder}", *corpus, *METHODS["noisy_mask_flow_causal"]]
    typed += ["module.forwards=[1,2]", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    run = tmp_path / "out" / "meanflow_from_causal" / "run"
    modes.fit(configure(*typed, f"paths.run_dir={run}"))
    found = json.loads((run / "record.json").read_text())["rows"]
    assert {row["method"] for row in found} >= {"student", "teacher"}
    capsys.readouterr()
    modes.generate(configure(*typed, "mode=generate", "prompt='jump 3'", "temperature=0"))
    assert "jump 3 →" in capsys.readouterr().out


@pytest.mark.slow
def test_a_published_dream_is_trained_further(configure, corpus, tmp_path):
    typed = [f"model.path={write_dream(tmp_path / 'dream')}", "model.conversion=bidirectional", "model.lora_rank=2"]
    run = tmp_path / "out" / "masked_from_causal" / "run"
    more = ["module.forwards=[1]", "trainer.max_steps=2", f"paths.run_dir={run}"]
    modes.fit(configure("experiment=masked_from_causal", *corpus, *typed, *more))
    described = json.loads((run / "model" / "config.json").read_text())
    assert (described["mask_token_id"], described["conversion"]) == (261, "bidirectional")


def test_a_teacher_that_is_not_there_is_answered_with_what_to_type(configure, corpus):
    with pytest.raises(UsageError, match=r"masked_teacher is not there; type teacher\.path="):
        modes.fit(configure("experiment=meanflow_from_causal", *corpus))


@pytest.mark.slow
def test_resumed_it_is_the_uninterrupted_run(configure, corpus, teacher, tmp_path):
    typed = ["experiment=meanflow_from_causal", f"teacher.path={teacher}", *corpus, "module.forwards=[1]"]
    typed += [*METHODS["noisy_mask_flow_causal"], "trainer.max_steps=6", "trainer.val_check_interval=3"]
    whole, again = (tmp_path / "out" / "meanflow_from_causal" / name for name in ("whole", "again"))
    kept = ["callbacks.checkpoint.every_n_train_steps=4", "callbacks.checkpoint.save_top_k=-1"]
    modes.fit(configure(*typed, *kept, f"paths.run_dir={whole}"))
    (middle,) = (path for path in whole.rglob("*.ckpt") if torch.load(path, weights_only=True)["global_step"] == 4)
    modes.fit(configure(*typed, f"paths.run_dir={again}", f"ckpt_path='{middle}'"))
    one, other = (load_file(run / "student" / "student.safetensors") for run in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    early = torch.load(middle, weights_only=True)["stages"]["average"]
    assert any(not torch.equal(weight, early[name]) for name, weight in one.items())
