"""MDLM's published layout from end to end: sampled and judged as it is, asked, evaluated, and as a teacher of every student."""

import json
from contextlib import nullcontext

import pytest
import torch
from helpers.experiment import SMALL, answer, model_overrides, tiny_qwen
from helpers.gpt2_bytes import gpt2_bytes
from helpers.mdlm import CONFIG, make_weights, write_checkpoint, write_mdlm
from helpers.trainer import quiet_trainer

from app import modes
from app.evaluated import EvaluationOptions, TextRequest, read_evaluated
from lightning_modules.logit_flow import LogitFlowModule
from lightning_modules.noisy_mask_flow import NoisyMaskFlowModule
from lightning_modules.step_halving import StepHalvingModule
from models.backbones.dit import DitConfig, DitModel, load_dit
from models.flow.student_files import load_student
from models.functional.errors import UsageError


@pytest.fixture
def short(configure, tmp_path):
    return ["experiment=mdlm_owt", *model_overrides(configure("experiment=mdlm_owt"), tmp_path), "logger=none"]


def test_the_published_model_is_sampled_and_judged_without_training(configure, tmp_path, capsys, short):
    rows = ["data.max_eval_rows=8", "data.eval_batch_size=8", f"data.judge.path={tiny_qwen(tmp_path / 'judge')}"]
    folder = tmp_path / "out" / "mdlm_owt" / "run"
    modes.test(configure(*short, *rows, "mode=test", f"paths.run_dir={folder}"))
    table = json.loads((folder / "record.json").read_text())["rows"]
    found = {row["decoder"]: row for row in table if row["method"] == "teacher"}
    assert set(found) == {"teacher, sampled"} | {f"teacher, entropy ≤ {h}, sampled" for h in ("0.1", "0.8")}
    assert all(row["quality"]["judge_perplexity"] > 1 for row in found.values())
    assert {row["nfe"] for row in table if row["decoder"] == "teacher, sampled"} == {1, 2}
    capsys.readouterr()
    said = answer(configure(*short, "mode=generate", "forwards=2"), capsys)
    assert said == answer(configure(*short, "mode=generate", "forwards=2", "stream=true"), capsys)


def test_a_trained_copy_comes_before_the_published_one(configure, tmp_path, short):
    rows = ["data.max_eval_rows=8", "data.eval_batch_size=8", "data.batch_size=4", "data.val_fraction=0.1"]
    rows += ["module.forwards=[1]", "module.commit_rules=null", "trainer.precision=32-true"]
    run = tmp_path / "out" / "mdlm_owt"
    modes.fit(configure(*short, *rows, "trainer.max_steps=1", "module.lr=0.1", f"paths.run_dir={run}/trained"))
    assert not torch.equal(
        load_dit(run / "trained" / "model").embedding, make_weights()["backbone.vocab_embed.embedding"]
    )
    modes.test(configure(*short, *rows, "mode=test", f"paths.run_dir={run}/again"))
    figures = [
        next(
            row["quality"]
            for row in json.loads((run / name / "record.json").read_text())["rows"]
            if row["method"] == "model"
        )
        for name in ("trained", "again")
    ]
    assert figures[0]["nll_bound"] == pytest.approx(figures[1]["nll_bound"])


def test_the_harness_reads_a_folder_and_says_what_it_lacks(tmp_path):
    folder = write_mdlm(tmp_path / "mdlm")
    with pytest.raises(UsageError, match="holds no tokenizer; write it there"):
        read_evaluated(EvaluationOptions(path=str(folder)), torch.device("cpu"))
    gpt2_bytes(folder)
    found = read_evaluated(EvaluationOptions(path=str(folder), decoder="confidence:0.9"), torch.device("cpu"))
    assert (found.kind, found.context, found.likelihood) == ("masked diffusion model", CONFIG["model_length"], "bound")
    assert found.decoder(TextRequest(length=4)).name == "teacher, confidence ≥ 0.9"


STUDENTS = {
    LogitFlowModule: {"prompt_length": 2, "prompt_hidden_size": 4, "prompt_rank": 2},
    NoisyMaskFlowModule: {
        "prompt_length": 2, "prompt_hidden_size": 4, "prompt_rank": 2, "student_forwards": (1, 2), "ode_steps": 2,
        "stages": {name: {"share": 1 / 3, "lr": 1e-2} for name in ("adapt", "flow", "polish")},
    },
    StepHalvingModule: {"start_forwards": 2, "student_forwards": (1,)},
}  # fmt: skip


def teacher_for(data):
    ids = data.special_ids()
    torch.manual_seed(0)
    sizes = {"hidden_dim": 16, "n_blocks": 2, "n_heads": 2, "cond_dim": 4, "model_length": 32}
    return DitModel(DitConfig(vocab_size=ids["vocab_size"], mask_token_id=ids["mask_token_id"], **sizes)).eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in STUDENTS]
    + [
        (NoisyMaskFlowModule, {"adapter": "lora", "lora_rank": 2}),
        (StepHalvingModule, {"adapter": "lora", "lora_rank": 2}),
    ],
)
def test_every_student_trains_on_it_and_is_kept(tiny_oracle, tmp_path, kind, options):
    teacher = teacher_for(tiny_oracle)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    module = kind(teacher, forwards=(2,), **STUDENTS[kind] | options)
    if hasattr(module.student, "soft_prompt"):
        module.student.soft_prompt.gate.data.fill_(0.5)  # a gate that a step closes would hold the rest still
    start = module.student.trainable()
    quiet_trainer(6).fit(module, tiny_oracle)
    moved = [name for name, weight in module.student.trainable().items() if not torch.equal(weight, start[name])]
    assert any("soft_prompt" in name or "blocks" in name for name in moved)
    kept = {name: weight for name, weight in module.teacher.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(kept[name], weight) for name, weight in before.items())
    module.save_student(tmp_path / "student")
    again = load_student(tmp_path / "student", teacher_for(tiny_oracle))
    rows = {name: column[:4] for name, column in tiny_oracle.rows["test"].columns.items()}
    decoder = module.decoders()[1]
    texts = decoder(rows, torch.Generator().manual_seed(0))
    assert (texts != teacher.mask_id).all()
    with getattr(module, "averaged", nullcontext)():
        wanted = module.student.trainable()
    assert all(torch.equal(again.trainable()[name], weight) for name, weight in wanted.items())


@pytest.mark.slow
def test_a_checkpoint_is_the_teacher_of_the_recipe(configure, tmp_path):
    """A Lightning checkpoint, converted, as teacher.path of experiment=flow_owt; its student's table."""
    from models.backbones.dit_checkpoint import main

    main(
        [
            str(write_checkpoint(tmp_path / "a.ckpt")),
            str(tmp_path / "mdlm"),
            "--weights",
            "raw",
            "--mask-token-id",
            "257",
        ]
    )
    texts = "\n".join(json.dumps({"text": f"A text about {k}."}) for k in range(60))
    (tmp_path / "rows.jsonl").write_text(texts)
    short = ["experiment=flow_owt", f"teacher.path={tmp_path}/mdlm", f"data.tokenizer={gpt2_bytes(tmp_path / 'gpt2')}"]
    short += [f"data.{split}={tmp_path}/rows.jsonl" for split in ("train", "test")]
    short += [*SMALL, "data.sequence_length=16", "data.batch_size=4", "data.max_eval_rows=8", "module.forwards=[1,16]"]
    short += ["trainer.accumulate_grad_batches=1", "trainer.max_steps=6", "trainer.val_check_interval=6", "logger=none"]
    folder = tmp_path / "out" / "flow_owt" / "run"
    modes.fit(configure(*short, "data.val_fraction=0.1", f"paths.run_dir={folder}"))
    methods = {row["method"] for row in json.loads((folder / "record.json").read_text())["rows"]}
    assert {"teacher", "student", "control"} <= methods
