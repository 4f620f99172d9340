"""What cannot work is refused by a sentence that names it, before any long work."""

import errno
import os

import pytest
import torch
from helpers.experiment import FLOWS, SMALL
from hydra.core.global_hydra import GlobalHydra
from lightning.fabric.utilities.exceptions import MisconfigurationException

from app import modes
from app.build import build
from models.functional.errors import UsageError
from reporting.console import sentence_for

MAIN = "experiment=meanflow_llada"


def test_a_teacher_is_kept_only_when_whole_and_damaged_checkpoints_are_passed_over(configure, tmp_path, capsys):
    short = [
        MAIN,
        "data.size=tiny",
        "data.train_rows=64",
        "data.val_rows=16",
        "data.test_rows=16",
        "data.batch_size=16",
        "data.eval_batch_size=16",
        "trainer.val_check_interval=2",
        "trainer.max_steps=2",
        "module.forwards=[1]",
        *FLOWS["noisy_mask_flow"],
        *SMALL,
    ]
    short += ["teacher.max_steps=8", "teacher.callbacks.checkpoint.every_n_train_steps=1"]
    build(configure(*short, "+trainer.limit_train_batches=2", "trainer.max_epochs=1"))
    assert "used but not kept" in capsys.readouterr().out
    (kept,) = (tmp_path / "cache" / "teachers").iterdir()
    assert kept.name.endswith(".partial")
    (kept / "last.ckpt").write_bytes(b"half a checkpoint")
    build(configure(*short))
    assert "is damaged, starting its training again" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "cache" / "teachers").iterdir()] == [kept.name.removesuffix(".partial")]


BLOCKS = ["experiment=objectives", "module/objective=block_diffusion"]
MISTAKES = [  # of the main job where no experiment is named
    (["mode=train"], "mode=train is not known; type mode=fit"),
    (["ckpt_path=nowhere.ckpt"], "nowhere.ckpt does not exist; type ckpt_path=last"),
    (["teacher.path=nowhere"], "nowhere"),
    (["teacher.path={gpt2}"], "type teacher.path=GSAI-ML/LLaDA-8B-Instruct"),
    (["experiment=qstar_oracle", "pair.target.path=nowhere"], "pair.target.path=nowhere: this folder does not exist"),
    (["experiment=qstar_oracle", "pair.theta.path={file}"], "pair.theta.path={file} is a file"),
    (["module.sigma=nan"], "module.sigma=nan is not a number"),
    (["mode=generate", "prompt='who=anna'"], "no student has been trained"),
    (
        ["mode=generate", "prompt='who=anna'", "ckpt_path=last", "student_path=mine"],
        "ckpt_path=last and student_path=mine each name what is asked; leave one of them out",
    ),
    (["mode=generate", "prompt_file=none.txt"], "prompt_file=none.txt does not exist"),
    (["mode=report", "paths.output_dir=empty"], "the folder empty does not exist"),
    (["module=logit_flow", "module.loss=huber"], "module.loss=huber"),
    (["data.size=giant"], "data.size=tiny, small or large"),
    (["model.num_attention_heads=5"], "model."),
    (["model.max_position_embeddings=8"], "need 20 positions, the model has 8"),
    (["experiment=meanflow_scan"], "data.train has no value; type data.train=<value>"),
    (["experiment=meanflow_scan", "data.train=nowhere.jsonl"], "nowhere.jsonl"),
    (["data.size=tiny"], "module.forwards=[1, 2, 4, 8, 16] must lie between 1 and the response length 6"),
    (["module.teacher_block_length=5"], "module.teacher_block_length=5 must divide the response length 16"),
    (
        ["module.teacher_block_length=8"],
        "makes 2 blocks, so each of module.forwards=[1, 2, 4, 8, 16] must be a multiple of 2",
    ),
    (["experiment=llada_oracle", "module.block_length=8"], "module.block_length=8 makes 2 blocks"),
    (
        [*BLOCKS, "module.objective.block_length=5"],
        "module.objective.block_length=5 must divide the response length 16",
    ),
    ([*BLOCKS, "module.block_length=8", "module.forwards=[2]"], "with blocks of 4; type module.block_length=null"),
    ([*BLOCKS, "module.cache=dual"], "module.cache=dual is for LLaDA's bidirectional body"),
    (["experiment=objectives", "module.cache=dual"], "for models that fill masks; type module.cache=none"),
    (["experiment=llada_oracle", "module.cache=suffix"], "module.cache=suffix is not known; type one of none, prefix"),
    (["experiment=llada_oracle", "module.cache_refresh=2"], "module.cache_refresh=2 needs a cache"),
    (["module.teacher_remasking=best"], "module.teacher_remasking=best is not known"),
    (["module=logit_flow", "module.time_law=cauchy"], "type one of uniform, logit_normal"),
    (["module=logit_flow", "module.correction_limit=0"], "must be above 0"),
    (["module.jvp_backend=magic"], "forward_ad, finite_difference"),
    (["experiment=llada_oracle", "mode=generate"], "trains no student"),
    (
        ["experiment=llada_oracle", "module/objective=next_token"],
        "needs a causal model; type model=small",
    ),
    (["experiment=objectives", "model.attention=sideways"], "model.attention=sideways is not known"),
    (["experiment=objectives", "callbacks.budget.flops=-1"], "callbacks.budget.flops=-1 must be above 0"),
    (["experiment=next_token_qwen", "model.path=./nowhere", "data=oracle"], "folder does not exist"),
    (["experiment=llada_oracle", "mode=test"], "no run of it left a checkpoint"),
    (["module.stages.flow.share=0.9"], "must add up to 1"),
    (["module.adapter=magic"], "type one of prefix, prefix+mask_noise, lora, full"),
    (["module.student_forwards=[1,64]"], "module.student_forwards=[1, 64]"),
    (["mode=generate", "decoder=oracle"], "decoder=oracle is not known; type one of student, teacher"),
    (["mode=generate", "n=0"], "n=0 must be at least 1"),
    (["mode=generate", "forwards=-2"], "forwards=-2 must be at least 1"),
    (["seed=-1"], "seed=-1 must be at least 0"),
    (["data.train_rows=0"], "data.train_rows=0 must be at least 1"),
    (["data.batch_size=-1"], "data.batch_size=-1 must be at least 1"),
    (["experiment=objectives", "module.lr=-1"], "module.lr=-1 must be at least 0"),
    (["experiment=objectives", "callbacks.ema.decay=2"], "callbacks.ema.decay=2 must be at least 0 and less than 1"),
    (["trainer.precision=abc"], "trainer.precision=abc is not known; type one of "),
    (["trainer.devices=many"], "trainer: "),
    (
        ["trainer.num_nodes=2"],
        "waits for 2 machines, and no other one can find this process; on one machine type trainer.",
    ),
    (["trainer.precision=bf16-true"], "what trains of a student is float32; type trainer.precision=bf16-mixed"),
    (["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=1"], "there is one only; type trainer.devices=2"),
    (["module=logit_flow", "compile=inductor"], "compile=inductor: forward-mode derivatives do not pass through it"),
    (["compile=fast"], "compile=fast is not known; type one of inductor, aot_eager"),
    (["+module.nonsense=1"], "nonsense"),
    (
        ["experiment=concept_oracle", "model.attention=null"],
        "type model.attention=causal or model.attention=bidirectional",
    ),
    (["recompute=maybe"], "recompute=maybe should be a valid boolean"),
    (["seed=4294967296"], "seed=4294967296 must be at most 4294967295"),
    (["seed=-1"], "seed=-1 must be at least 0"),
    (
        ["data.train_rows=9223372036854775808"],
        "data.train_rows=9223372036854775808 must be at most 9223372036854775807",
    ),
    (["data.seed=-100000000000000000000"], "data.seed=-100000000000000000000 must be at least"),
    (["module.forwards=[1,100000000000000000000]"], "module.forwards=100000000000000000000 must be at most"),
    (["data.train_rows=1000000000000000"], "memory ran out ("),
    (["prompt=hello"], "prompt= is answered by mode=generate, and this is mode=fit; type mode=generate"),
    (["mode=test", "prompt_file=p.txt"], "prompt_file= is answered by mode=generate, and this is mode=test"),
    (["mode=test", "answers_file=a.jsonl"], "answers_file= is answered by mode=generate, and this is mode=test"),
    (["mode=generate", "prompt=a", "prompt_file=p.txt"], "prompt= and prompt_file=p.txt are both given"),
    (["experiment=objectives", "student_path=x"], "student_path=x: experiment=objectives/next_token trains no student"),
    (["mode=generate", "prompt='${nothing}'"], "prompt: Interpolation key 'nothing' not found; ${...} stands for"),
    (["ckpt_path={gpt2}"], "ckpt_path={gpt2} is a folder; type "),
    (["trainer.accelerator=tpu"], "trainer: Requirement 'torch_xla"),
]


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total"),
            " (20.00 MiB were",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5368709120 bytes."),
            " (5.0 GiB were",
        ),
        (MemoryError("Unable to allocate 7.11 PiB for an array"), " (7.11 PiB were"),
        (MemoryError(), ";"),
    ],
)
def test_too_little_memory_is_named(error, asked):
    assert sentence_for(error).startswith(f"memory ran out{asked}")
    assert sentence_for(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_what_may_not_be_written_is_named(code):
    error = OSError(code, os.strerror(code), "out/runs.txt")
    assert sentence_for(error).startswith(f"out/runs.txt: {os.strerror(code)}; change whose it is")
    assert sentence_for(OSError(code, os.strerror(code))) is None  # nothing to name


def test_a_missing_gpu_is_answered_with_what_to_type():
    """By the words of Lightning's own error, which it raises where there is none."""
    missing = MisconfigurationException("No supported gpu backend found!")
    assert sentence_for(missing).startswith("PyTorch sees no GPU here; type trainer=cpu")
    assert sentence_for(MisconfigurationException("other")) == "other"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
@pytest.mark.parametrize(("folder", "option"), [("out/meanflow_llada/run", "run_dir"), ("data", "cache_dir")])
def test_a_folder_of_someone_else_is_named(configure, tmp_path, folder, option):
    place = tmp_path / folder
    place.mkdir(parents=True)
    place.chmod(0o555)
    try:
        with pytest.raises(OSError, match="denied") as caught:
            modes.run_mode(configure(MAIN, *SMALL, f"paths.{option}={place}/new"))
    finally:
        place.chmod(0o755)
    assert f"{place}/new" in sentence_for(caught.value)


def test_a_damaged_checkpoint_is_refused_before_any_work(configure, tmp_path):
    (tmp_path / "half.ckpt").write_bytes(b"PK half of a checkpoint")
    with pytest.raises(UsageError, match=r"ckpt_path=half.ckpt is damaged"):
        modes.fit(configure(MAIN, "ckpt_path=half.ckpt"))


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_mistakes_get_a_sentence(configure, tmp_path, overrides, message):
    """What `main` would print, and that it comes before any training."""
    places = {"gpt2": tmp_path / "gpt2", "file": tmp_path / "gpt2" / "config.json"}
    places["gpt2"].mkdir()
    places["file"].write_text('{"model_type": "gpt2"}')
    for name, place in places.items():
        overrides = [option.replace(f"{{{name}}}", str(place)) for option in overrides]
        message = message.replace(f"{{{name}}}", str(place))
    try:
        named = any(option.startswith(("experiment=", "mode=report")) for option in overrides)
        cfg = configure(*([] if named else [MAIN]), *overrides)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            modes.run_mode(cfg)
    finally:
        GlobalHydra.instance().clear()
    sentence = sentence_for(caught.value)
    assert sentence is not None, caught.value
    assert message in sentence
