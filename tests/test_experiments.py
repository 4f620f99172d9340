"""Every experiment composes and runs one step of every stage; every mistake gets a sentence instead of a stack trace."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_causal import tiny_causal
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate

from callbacks.console import sentence_for
from datamodules.tokenizer import build_tokenizer
from models.backbones.causal_lm import save_causal
from models.backbones.llada import build_llada
from models.backbones.sizes import STAND_IN
from models.functional.errors import UsageError
from wiring import modes

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
SMALL = ["trainer.accelerator=cpu", "model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16"]


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """A function that composes a configuration whose outputs and caches lie in tmp_path."""
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()

    def build(*overrides: str):
        places = ["paths.output_dir=out", "paths.cache_dir=cache", f"paths.run_dir={tmp_path}/out/x/run"]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", overrides=[*places, *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return cfg

    yield build
    GlobalHydra.instance().clear()


def pairs_overrides(cfg, folder: Path) -> list[str]:
    """For an experiment on files: small files with its own field names."""
    if "PairsDataModule" not in cfg.data._target_:
        return []
    more = ("food", "near", "priceRange", "customer rating", "eatType", "area", "familyFriendly")
    known = dict.fromkeys(more, "any")
    prompts = [{"name": f"Cafe {k}", **known} if cfg.data.prompt_field == "slots" else f"jump {k}" for k in range(80)]
    rows = [{cfg.data.prompt_field: p, cfg.data.response_field: f"I_JUMP {k}"} for k, p in enumerate(prompts)]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return [f"data.{split}={path}" for split in ("train", "val", "test")]


def model_overrides(cfg, folder: Path) -> list[str]:
    """For an experiment on Hugging Face models: tiny ones in folders; for others small sizes."""
    if cfg.pair is not None and cfg.pair.theta.path is not None:
        paths = []
        for name in cfg.pair:
            save_causal(tiny_causal(300, architecture="qwen3"), folder / name)
            paths.append(f"pair.{name}.path={folder}/{name}")
        return [*paths, "trainer.accelerator=cpu", "module.lora_rank=2", "data.tokenizer=byte"]
    if cfg.study is not None:
        return SMALL
    (folder / "text.txt").write_text("".join(f"A paragraph about {k}.\n\n" for k in range(60)))
    text = [f"data.train={folder}/text.txt", "data.cut=blank_line", "data.length=16"]
    packed = "TextDataModule" in cfg.data._target_
    if "Unprompted" in cfg.data._target_:
        text += ["module.forwards=[1,2]"]
    deep = 3 if "split" in cfg.module else None  # a model that is split in three
    small = [*SMALL, *([f"model.num_hidden_layers={deep}", "module.split=null"] if deep else [])]
    if "path" not in cfg.model:
        return [*small, *text, "model.num_attention_heads=2", "model.num_key_value_heads=2"] if packed else small
    own = ["trainer.accelerator=cpu", f"model.path={tiny_qwen(folder / 'qwen', deep or 2)}", "model.lora_rank=2"]
    return [*own, *text] if packed else own


def tiny_qwen(folder: Path, layers: int = 2) -> Path:
    """A Hugging Face folder with a causal model and its tokenizer (bytes)."""
    model = tiny_causal(264, architecture="qwen3", num_hidden_layers=layers)
    return save_causal(model, folder, build_tokenizer("byte", [], 0, folder, packed=True))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_one_step_of_every_stage(configure, tmp_path, capsys, name):
    plain = configure(f"experiment={name}")
    small = [*model_overrides(plain, tmp_path), *pairs_overrides(plain, tmp_path)]
    cfg = configure(f"experiment={name}", "trainer.fast_dev_run=true", "data.eval_batch_size=8", *small)
    modes.fit(cfg)
    printed = capsys.readouterr().out
    assert cfg.name.split("/")[0] == name
    assert ("C" if cfg.study else "forwards") in printed
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # a shortened teacher is never kept
    header = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    assert f"python run.py experiment={name}" in header


TINY = [
    "experiment=meanflow_llada",
    "data.size=tiny",
    "data.train_rows=64",
    "data.test_rows=32",
    "data.batch_size=16",
    "data.eval_batch_size=16",
    "teacher.max_steps=3",
    "trainer.max_steps=3",
    "trainer.val_check_interval=2",
    "module.forwards=[1,2]",
    *SMALL,
]
FLOWS = {
    "noisy_mask": ["module.student_forwards=[1,2]", "module.ode_forwards=[2]", "module.ode_steps=2"],
    "logit": [],
    "step_halving": ["module.student_forwards=[1,2]", "module.start_forwards=4"],
}


@pytest.mark.parametrize("flow", FLOWS)
def test_the_whole_way_from_fit_to_generate_and_report(configure, tmp_path, capsys, flow):
    """A few steps of everything: teacher cached and reused, student saved, answers printed, record complete."""
    short = [*TINY, f"flow={flow}", *FLOWS[flow]]
    place = f"paths.run_dir={tmp_path}/out/meanflow_llada/first"
    assert isinstance(modes.fit(configure(*short, place)), float)
    printed = capsys.readouterr().out
    assert "no matching one is cached" in printed
    folder = tmp_path / "out" / "meanflow_llada" / "first"
    record = json.loads((folder / "record.json").read_text())
    students = 3 if flow == "noisy_mask" else 2
    assert [row["method"] for row in record["rows"]] == ["teacher"] * 2 + ["student"] * students + ["control"] * 2
    assert record["data"]["conditional_total_correlation"] > 1
    assert record["rows"][0]["cost"]["tokens_per_s"] > 0
    assert record["rows"][0]["n_samples"] == 32
    for made in ("frontier.png", "student/student.safetensors", "checkpoints/last.ckpt", "tensorboard/run"):
        assert (folder / made).exists(), made

    modes.fit(configure(*short, f"paths.run_dir={tmp_path}/out/meanflow_llada/second", "ckpt_path=last"))
    assert "reusing the trained one" in capsys.readouterr().out.replace("\n", " ")
    modes.fit(configure(*short, f"paths.run_dir={tmp_path}/out/meanflow_llada/third", f"student_path={folder}/student"))
    capsys.readouterr()

    (tmp_path / "prompts.txt").write_text("who=anna\nwho=boris where=paris\n")
    modes.generate(configure(*short, "mode=generate", "prompt_file=prompts.txt"))
    answers = capsys.readouterr().out.splitlines()
    assert [line.split(" → ")[0] for line in answers] == ["who=anna", "who=boris where=paris"]
    more = ["mode=generate", "prompt='who=anna'", "n=2", "forwards=2"]
    modes.generate(configure(*short, *more, "decoder=teacher", "temperature=1.0"))
    assert capsys.readouterr().out.count("→") == 2
    if flow == "logit":
        with pytest.raises(UsageError, match="type decoder=teacher for more"):
            modes.generate(configure(*short, *more))
    else:
        modes.generate(configure(*short, *more))
        assert capsys.readouterr().out.count("→") == 2
    ask = ["mode=generate", "prompt='who=anna'"]
    assert answer(configure(*short, *ask), capsys) == answer(configure(*short, *ask, "stream=true"), capsys)
    modes.test(configure(*short, "mode=test", place))
    modes.report(configure("mode=report"))
    assert "resampling floor" in capsys.readouterr().out
    assert (tmp_path / "out" / "report" / "frontier.png").exists()


@pytest.mark.parametrize("flow", sorted(path.stem for path in (ROOT / "conf" / "flow").glob("*.yaml")))
@pytest.mark.parametrize("name", ["meanflow_llada", "meanflow_scan", "meanflow_e2e", "meanflow_text"])
def test_every_flow_fits_every_experiment(configure, name, flow):
    """One word switches: no experiment sets an option that only one flow has."""
    cfg = configure(f"experiment={name}", f"flow={flow}")
    stand_in = build_llada(vocab_size=5, mask_token_id=2, eos_token_id=1, pad_token_id=0, **STAND_IN)
    assert instantiate(cfg.module, _convert_="all", teacher=stand_in).teacher is stand_in


@pytest.mark.parametrize("name", ["meanflow_llada", "meanflow_scan", "meanflow_e2e", "meanflow_text"])
def test_a_published_model_fits_every_experiment(configure, name):
    cfg = configure(f"experiment={name}", "model=llada_8b", "model.path=somewhere")
    accepted = inspect.signature(get_method(cfg.model._target_)).parameters
    assert set(cfg.model) - {"_target_"} <= set(accepted)


def answer(cfg, capsys) -> str:
    """The last line that mode=generate prints."""
    modes.generate(cfg)
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("objective", sorted(path.stem for path in (ROOT / "conf/module/objective").glob("*.yaml")))
def test_every_objective_runs_and_is_a_row_of_the_report(configure, tmp_path, capsys, objective):
    short = ["data.train_rows=64", "data.test_rows=32", "data.batch_size=16", "data.size=tiny", "module.forwards=[1,2]"]
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=2", "logger=none"]
    choice = f"module/objective={objective}"
    folder = tmp_path / "out" / "objectives" / objective / "run"
    place = [f"paths.run_dir={folder}", "callbacks.goal.below=100"]
    cfg = configure("experiment=objectives", choice, *short, *steps, *SMALL, *place)
    assert cfg.name == f"objectives/{objective}"
    modes.fit(cfg)
    record = json.loads((folder / "record.json").read_text())
    (model,) = (row for row in record["rows"] if row["method"] == "model")
    found = model["quality"]
    assert found["flops_per_step"] > 0
    assert found["train_flops"] == 4 * found["flops_per_step"]
    assert found["train_tokens"] == 4 * 16 * 6
    assert 0 <= found["probe"] <= 1
    likelihood = [name for name in ("nll", "nll_bound") if name in found]
    assert len(likelihood) == (objective not in ("latent", "continuous_diffusion"))
    assert ("goal_tokens" in found) == bool(likelihood)
    assert set(model["curve"]) == ({"steps", "tokens", "nll", "nll_truth"} if likelihood else set())
    capsys.readouterr()
    ask = ["experiment=objectives", choice, *short, *SMALL, "mode=generate", "prompt='who=anna'"]
    if objective == "latent":
        with pytest.raises(UsageError, match="predicts no tokens"):
            modes.generate(configure(*ask))
    else:  # from the checkpoint, whole and as it is written
        said = answer(configure(*ask), capsys)
        assert said == answer(configure(*ask, "stream=true"), capsys)
        again = folder.with_name("again")
        modes.export(configure("experiment=objectives", choice, *short, *SMALL, f"paths.run_dir={again}"))
        assert (again / "model" / "README.md").is_file()
        assert said == answer(configure(*ask), capsys)
    modes.report(configure("mode=report"))
    assert f"objectives/{objective}" in (tmp_path / "out" / "report" / "frontier.md").read_text()
    assert (tmp_path / "out" / "report" / "learning.png").exists() == bool(likelihood)


def test_a_causal_model_is_adapted_exported_and_answers(configure, tmp_path, capsys):
    short = ["experiment=next_token_qwen", f"model.path={tiny_qwen(tmp_path / 'qwen')}", "logger=none"]
    short += ["trainer.accelerator=cpu", "data=oracle", "~data.tokenizer", "data.size=tiny", "module.forwards=[1]"]
    rows = ["data.train_rows=64", "data.test_rows=16", "data.batch_size=16"]
    with pytest.raises(UsageError, match="no run of it left a causal model"):
        modes.generate(configure(*short, "mode=generate", "prompt='who=anna'"))
    folder = tmp_path / "out" / "next_token_qwen" / "first"
    modes.fit(configure(*short, *rows, "trainer.max_steps=2", f"paths.run_dir={folder}"))
    assert (folder / "model" / "adapter_model.safetensors").is_file()
    assert (folder / "model_merged" / "model.safetensors").is_file()
    capsys.readouterr()
    modes.generate(configure(*short, "mode=generate", "prompt='who=anna'", "n=3", "temperature=0"))
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 3
    assert len({line.split(" → ")[1] for line in answers}) == 1  # greedy


def test_online_concepts_are_trained_kept_and_answer(configure, tmp_path, capsys):
    short = ["experiment=concept_online_oracle", "data.size=tiny", "logger=none", *SMALL, "model.num_hidden_layers=3"]
    rows = ["data.train_rows=64", "data.test_rows=16", "data.batch_size=16", "module.codes=8", "trainer.max_steps=2"]
    folder = tmp_path / "out" / "concept_online_oracle" / "first"
    modes.fit(configure(*short, *rows, f"paths.run_dir={folder}"))
    row = next(r for r in json.loads((folder / "record.json").read_text())["rows"] if r["method"] == "model")
    assert {"nll", "nll_truth", "compression"} <= row["quality"].keys()
    assert all(row["cost"][name] > 0 for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "kv_bytes"))
    assert (folder / "model" / "online_concepts.safetensors").is_file()
    capsys.readouterr()
    modes.generate(configure(*short, "mode=generate", "prompt='who=anna'", "n=3", "temperature=0"))
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 3
    assert len({line.split(" → ")[1] for line in answers}) == 1  # greedy
    ask = [*short, "mode=generate", "prompt='who=anna'"]
    assert answer(configure(*ask), capsys) == answer(configure(*ask, "stream=true"), capsys)
    modes.test(configure(*short, *rows, "mode=test", f"paths.run_dir={tmp_path}/out/concept_online_oracle/second"))
    again = json.loads((tmp_path / "out/concept_online_oracle/second/record.json").read_text())["rows"]
    assert next(r for r in again if r["method"] == "model")["quality"] == pytest.approx(row["quality"])


def test_a_model_of_text_is_recorded_by_its_bits_per_byte_and_goes_on_with_a_text(configure, tmp_path, capsys):
    plain = configure("experiment=next_token_qwen")
    short = ["experiment=next_token_qwen", *model_overrides(plain, tmp_path), "trainer.max_steps=2", "logger=none"]
    modes.fit(configure(*short, f"paths.run_dir={tmp_path}/out/next_token_qwen/run"))
    folder = tmp_path / "out" / "next_token_qwen" / "run"
    (row,) = json.loads((folder / "record.json").read_text())["rows"]
    assert row["method"] == "model"
    assert row["quality"]["bits_per_byte"] > 0
    assert (folder / "model" / "adapter_model.safetensors").is_file()
    capsys.readouterr()
    modes.generate(configure(*short, "mode=generate", "prompt='A paragraph'"))
    assert "A paragraph → " in capsys.readouterr().out  # and goes on


def test_texts_without_a_prompt_are_judged_by_a_model_of_another_run(configure, tmp_path, capsys):
    plain = configure("experiment=meanflow_text")
    small = [*model_overrides(plain, tmp_path), "trainer.max_steps=3", "logger=none", "data.batch_size=4"]
    judge = tmp_path / "out" / "next_token_text" / "run"
    words = "data.vocab_size=2048"
    forwards = "module.forwards=[1,2]"
    modes.fit(configure("experiment=next_token_text", words, f"paths.run_dir={judge}", *small))
    flow = ["experiment=meanflow_text", "teacher.max_steps=2", *FLOWS["noisy_mask"], *small, forwards]
    place = f"paths.run_dir={tmp_path}/out/meanflow_text/run"
    modes.fit(configure(*flow, f"data.judge.path={judge}/model", place))
    record = json.loads((tmp_path / "out" / "meanflow_text" / "run" / "record.json").read_text())
    assert [row["decoder"] for row in record["rows"]][-2:] == ["product of marginals", "held-out text"]
    assert all(row["quality"]["judge_perplexity"] > 1 for row in record["rows"])
    assert "Judge's perplexity" in capsys.readouterr().out.replace("\n", " ")
    modes.generate(configure(*flow, "mode=generate", "n=2"))
    assert all(text.strip() for text in capsys.readouterr().out.splitlines()[-2:])
    with pytest.raises(UsageError, match="leave prompt= out"):
        modes.generate(configure(*flow, "mode=generate", "prompt=once"))
    with pytest.raises(UsageError, match="the judge has a vocabulary"):
        modes.fit(configure(*flow, f"data.judge.path={judge}/model", "data.tokenizer=byte"))


def test_a_planner_executor_is_trained_exported_and_answers(configure, tmp_path, capsys):
    short = [
        "experiment=concept_oracle", "data.size=tiny", "data.train_rows=64", "data.test_rows=16", "data.batch_size=16",
        "logger=none", *SMALL,
    ]  # fmt: skip
    folder = tmp_path / "out" / "concept_oracle" / "first"
    modes.fit(configure(*short, "trainer.max_steps=2", "trainer.val_check_interval=2", f"paths.run_dir={folder}"))
    assert (folder / "model" / "concepts.safetensors").is_file()
    ask = ["mode=generate", "prompt='who=anna'", "n=3", "temperature=0"]
    capsys.readouterr()
    modes.generate(configure(*short, *ask))
    first = capsys.readouterr().out
    assert first.count("who=anna → ") == 3
    again = tmp_path / "out" / "concept_oracle" / "second"
    modes.export(configure(*short, "mode=export", f"paths.run_dir={again}"))
    assert (again / "model" / "backbone" / "config.json").is_file()
    capsys.readouterr()
    modes.generate(configure(*short, *ask))  # the newest is the one that was exported from the checkpoint
    assert capsys.readouterr().out == first
    assert answer(configure(*short, *ask, "stream=true"), capsys) == first.splitlines()[-1]


def test_a_causal_model_of_hugging_face_plans_and_answers(configure, tmp_path, capsys):
    plain = configure("experiment=concept_qwen")
    lengths = ["data.prompt_length=16", "data.response_length=16", "trainer.max_steps=2", "logger=none"]
    small = [*model_overrides(plain, tmp_path), *pairs_overrides(plain, tmp_path), *lengths]
    folder = tmp_path / "out" / "concept_qwen" / "first"
    modes.fit(configure("experiment=concept_qwen", *small, f"paths.run_dir={folder}"))
    assert (folder / "model" / "backbone" / "model.safetensors").is_file()  # adapters added in
    capsys.readouterr()
    modes.generate(configure("experiment=concept_qwen", *small, "mode=generate", "prompt='jump 3'", "temperature=0"))
    assert "jump 3 → " in capsys.readouterr().out


def test_a_budget_of_flops_sets_the_steps(configure, tmp_path):
    short = [
        "experiment=objectives",
        "data.train_rows=64",
        "data.test_rows=16",
        "data.size=tiny",
        "module.forwards=[1]",
        "logger=none",
        *SMALL,
    ]
    modes.fit(configure(*short, "trainer.max_steps=1", "data.batch_size=16"))
    record = tmp_path / "out" / "x" / "run" / "record.json"
    per_step = json.loads(record.read_text())["rows"][-1]["quality"]["flops_per_step"]
    modes.fit(configure(*short, "data.batch_size=16", f"callbacks.budget.flops={3.5 * per_step}"))
    assert json.loads(record.read_text())["rows"][-1]["quality"]["train_flops"] == 3 * per_step
    with pytest.raises(UsageError, match=r"callbacks.budget.flops=10 is less than one step"):
        modes.fit(configure(*short, "data.batch_size=16", "callbacks.budget.flops=10"))


def test_each_stage_runs_alone_from_the_student_of_another(configure, tmp_path):
    stages = ("adapt", "flow", "polish")
    only = {name: [f"module.stages.{other}.share={int(other == name)}" for other in stages] for name in stages}
    short = [*TINY, *FLOWS["noisy_mask"]]
    first = f"{tmp_path}/out/meanflow_llada/adapt"
    modes.fit(configure(*short, *only["adapt"], f"paths.run_dir={first}"))
    second = f"{tmp_path}/out/meanflow_llada/flow"
    modes.fit(configure(*short, *only["flow"], f"paths.run_dir={second}", f"student_path={first}/student"))
    assert (tmp_path / "out" / "meanflow_llada" / "flow" / "student" / "student.safetensors").is_file()
    with pytest.raises(UsageError, match="give both the same flow= and module options"):
        modes.fit(configure(*short, *only["flow"], "module.sigma=1.0", f"student_path={first}/student"))


def test_a_teacher_is_kept_only_when_whole_and_damaged_checkpoints_are_passed_over(configure, tmp_path, capsys):
    short = [
        "data.size=tiny",
        "data.train_rows=64",
        "data.val_rows=16",
        "data.test_rows=16",
        "data.batch_size=16",
        "data.eval_batch_size=16",
        "trainer.val_check_interval=2",
        "trainer.max_steps=2",
        "module.forwards=[1]",
        *FLOWS["noisy_mask"],
        *SMALL,
    ]
    short += ["teacher.max_steps=8", "teacher.callbacks.checkpoint.every_n_train_steps=1"]
    modes.fit(configure(*short, "+trainer.limit_train_batches=2", "trainer.max_epochs=1"))
    assert "used but not kept" in capsys.readouterr().out
    (kept,) = (tmp_path / "cache" / "teachers").iterdir()
    assert kept.name.endswith(".partial")
    (kept / "last.ckpt").write_bytes(b"half a checkpoint")
    modes.fit(configure(*short))
    assert "is damaged, starting its training again" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "cache" / "teachers").iterdir()] == [kept.name.removesuffix(".partial")]


MISTAKES = [
    (["mode=train"], "mode=train is not known; type mode=fit"),
    (["ckpt_path=nowhere.ckpt"], "nowhere.ckpt does not exist; type ckpt_path=last"),
    (["teacher.path=nowhere"], "nowhere"),
    (["mode=generate", "prompt='who=anna'"], "no student has been trained"),
    (["mode=generate", "prompt_file=none.txt"], "prompt_file=none.txt does not exist"),
    (["mode=report", "paths.output_dir=empty"], "the folder empty does not exist"),
    (["flow=logit", "module.loss=huber"], "module.loss=huber"),
    (["data.size=giant"], "data.size=tiny, small or large"),
    (["model.num_attention_heads=5"], "model."),
    (["model.max_position_embeddings=8"], "need 20 positions, the model has 8"),
    (["experiment=meanflow_scan"], "data.train has no value; type data.train=<value>"),
    (["experiment=meanflow_scan", "data.train=nowhere.jsonl"], "nowhere.jsonl"),
    (["module.nonsense=1"], "nonsense"),
    (["data.size=tiny"], "module.forwards=[1, 2, 4, 8, 16] must lie between 1 and the response length 6"),
    (["flow=logit", "module.time_law=cauchy"], "type one of uniform, logit_normal"),
    (["flow=logit", "module.correction_limit=0"], "must be above 0"),
    (["module.jvp_backend=magic"], "forward_ad, finite_difference"),
    (["experiment=llada_oracle", "mode=generate"], "trains no student"),
    (
        ["experiment=llada_oracle", "module/objective=next_token"],
        "needs a model that looks backwards only; type model=small",
    ),
    (["experiment=objectives", "model.attention=sideways"], "model.attention=sideways is not known"),
    (["experiment=objectives", "callbacks.budget.flops=-1"], "callbacks.budget.flops=-1 must be above 0"),
    (["experiment=next_token_qwen", "model.path=./nowhere", "data=oracle", "~data.tokenizer"], "folder does not exist"),
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
    (["trainer.precision=bf16-true"], "what trains of a student is float32; type trainer.precision=bf16-mixed"),
    (["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=1"], "there is one only; type trainer.devices=2"),
    (["flow=logit", "compile=inductor"], "compile=inductor: forward-mode derivatives do not pass through it"),
    (["compile=fast"], "compile=fast is not known; type one of inductor, aot_eager"),
    (["recompute=maybe"], "recompute=maybe should be a valid boolean"),
]


def test_a_damaged_checkpoint_is_refused_before_any_work(configure, tmp_path):
    (tmp_path / "half.ckpt").write_bytes(b"PK half of a checkpoint")
    with pytest.raises(UsageError, match=r"ckpt_path=half.ckpt is damaged"):
        modes.fit(configure("ckpt_path=half.ckpt"))


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_mistakes_get_a_sentence(configure, overrides, message):
    """What `main` would print, and that it comes before any training."""
    try:
        cfg = configure(*(f"+{o}" if o.startswith("module.nonsense") else o for o in overrides))
        with pytest.raises(Exception) as caught:  # noqa: PT011
            modes.run_mode(cfg)
    finally:
        GlobalHydra.instance().clear()
    sentence = sentence_for(caught.value)
    assert sentence is not None, caught.value
    assert message in sentence


@pytest.mark.parametrize(
    ("arguments", "expected", "code"),
    [
        (["experiment=nonsense"], "Could not find 'experiment/nonsense'", 1),
        (["mode=train"], "mode=train is not known; type mode=fit", 2),
        (["--help"], "python run.py experiment=meanflow_llada", 0),
    ],
)
def test_the_command_line_itself(tmp_path, arguments, expected, code):
    """In a process of its own: no traceback, the right exit status."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    output = done.stdout + done.stderr
    assert expected in output
    assert "Traceback" not in output
    assert done.returncode == code


def test_llada_8b_composes_and_says_what_it_needs_before_reading_anything(configure, monkeypatch):
    import models.backbones.memory as memory

    monkeypatch.setattr(memory, "available_memory", lambda device: 2 * 2**30)
    cfg = configure("model=llada_8b", "teacher=masked_diffusion")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        instantiate(cfg.model)
    assert "GiB" in sentence_for(caught.value)


def test_the_whole_way_between_two_models(configure, tmp_path, capsys):
    """A pair trained and kept, compared, drawn together, exported, asked; a second run takes both from the cache."""
    short = [
        *SMALL, "experiment=qstar_oracle", "data.size=tiny", "data.train_rows=64", "data.test_rows=32", "data.batch_size=16",
        "data.eval_batch_size=16", "pair.theta.max_steps=3", "pair.target.max_steps=3", "module.exactness_samples=64",
        "trainer.val_check_interval=2", "model.num_attention_heads=2", "model.num_key_value_heads=2",
    ]  # fmt: skip
    place = f"paths.run_dir={tmp_path}/out/qstar_oracle/first"
    modes.fit(configure(*short, place, "trainer.max_steps=3", "module.lora_rank=2"))
    printed = capsys.readouterr().out
    assert "theta: no matching one is cached" in printed
    assert "Between the models" in printed.replace("\n", " ")
    folder = tmp_path / "out" / "qstar_oracle" / "first"
    rows = {row["decoder"]: row for row in json.loads((folder / "record.json").read_text())["rows"]}
    assert rows["q*, alternating"]["quality"]["max_enumeration_error"] < 1e-12
    assert rows["q*, alternating"]["cost"].keys() >= {"speedup_vs_naive", "speedup_formula", "acceptance"}
    assert (folder / "theta" / "adapter_config.json").is_file()
    modes.test(configure(*short, "mode=test", f"paths.run_dir={tmp_path}/out/qstar_oracle/second"))
    assert "target: reusing the trained one" in capsys.readouterr().out.replace("\n", " ")
    resumed = ["mode=test", "ckpt_path=last", "module.lora_rank=2"]
    modes.test(configure(*short, *resumed, f"paths.run_dir={tmp_path}/out/qstar_oracle/third"))
    again = json.loads((tmp_path / "out" / "qstar_oracle" / "third" / "record.json").read_text())["rows"]
    assert again[0]["quality"]["nll_theta"] == pytest.approx(rows["π_θ alone"]["quality"]["nll_theta"], abs=1e-4)
    capsys.readouterr()
    modes.generate(configure(*short, "mode=generate", "prompt='who=anna'", "n=2"))
    assert capsys.readouterr().out.count("→") == 2
    ask = [*short, "mode=generate", "prompt='who=anna'"]
    assert answer(configure(*ask), capsys) == answer(configure(*ask, "stream=true"), capsys)
    with pytest.raises(InstantiationException) as error:  # before any model is trained
        modes.fit(configure(*short, "module.loss=mse", "paths.cache_dir=empty"))
    assert sentence_for(error.value) == "module.loss=mse is not known; type one of kl, acceptance"
    assert not (tmp_path / "empty" / "pairs").exists()
