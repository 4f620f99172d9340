"""The way of a user through run.py: train, test, report, export, ask; each method once."""

import json
import math
import re

import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.daily import daily
from helpers.experiment import FLOWS, SMALL, TINY, answer, model_overrides, pairs_overrides, tiny_qwen
from helpers.gpt2_bytes import gpt2_bytes
from helpers.word_pieces import word_pieces
from hydra.errors import InstantiationException

from app import modes
from app.build import data_of
from app.generate import find_decoder
from datamodules import lm1b, owt
from models.functional.errors import UsageError
from reporting.console import sentence_for


@pytest.mark.parametrize("flow", daily(FLOWS, "noisy_mask_flow"))
def test_the_whole_way_from_fit_to_generate_and_report(configure, tmp_path, capsys, flow):
    """A few steps of everything: teacher cached and reused, student saved, answers printed, record complete."""
    short = [*TINY, f"module={flow}", *FLOWS[flow]]
    place = f"paths.run_dir={tmp_path}/out/meanflow_llada/first"
    assert isinstance(modes.fit(configure(*short, place)), float)
    printed = capsys.readouterr().out
    assert "no matching one is cached" in printed
    folder = tmp_path / "out" / "meanflow_llada" / "first"
    record = json.loads((folder / "record.json").read_text())
    students = 3 if flow == "noisy_mask_flow" else 2
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
    modes.generate(
        configure(*short, "mode=generate", "prompt_file=prompts.txt", f"answers_file={tmp_path}/answers.jsonl")
    )
    assert "2 responses: " in capsys.readouterr().out
    rows = map(json.loads, (tmp_path / "answers.jsonl").open())
    assert [f"{row['prompt']} → {row['response']}" for row in rows] == answers
    more = ["mode=generate", "prompt='who=anna'", "n=2", "forwards=2"]
    modes.generate(configure(*short, *more, "decoder=teacher", "temperature=1.0"))
    assert capsys.readouterr().out.count("→") == 2
    ends_last = configure(*short, *more, "decoder=teacher", "module.teacher_ends_last=true")
    data = data_of(ends_last)
    asked = find_decoder(ends_last, None, data, torch.device("cpu"))
    assert asked.options["ends_last"] == data.end_ids()
    if flow == "logit_flow":
        with pytest.raises(UsageError, match="type decoder=teacher for more"):
            modes.generate(configure(*short, *more))
    else:
        modes.generate(configure(*short, *more))
        assert capsys.readouterr().out.count("→") == 2
    ask = ["mode=generate", "prompt='who=anna'"]
    assert answer(configure(*short, *ask), capsys) == answer(configure(*short, *ask, "stream=true"), capsys)
    modes.test(configure(*short, "mode=test", place))
    other = ["ckpt_path=last", "data.reveal_all=0", f"paths.run_dir={tmp_path}/out/meanflow_llada/fourth"]
    capsys.readouterr()
    modes.test(configure(*short, "mode=test", *other))
    assert "training it now" not in capsys.readouterr().out  # it has the checkpoint's teacher, whatever it is tested on
    modes.report(configure("mode=report"))
    assert "resampling floor" in capsys.readouterr().out
    assert (tmp_path / "out" / "report" / "frontier.png").exists()


def of_lm1b(folder, monkeypatch):
    """The benchmark's files, then its command; returns the tokenizer's folder."""
    for split, count in (("train", 100), ("test", 20)):
        path = folder / "raw" / lm1b.FILES[split].replace("*", "00000")
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"The {k}th cat met dog {k * k} , and it ran .\n" for k in range(count)))
    lm1b.main([str(folder / "raw"), str(folder)])
    return word_pieces(folder / "tokenizer")


def of_owt(folder, monkeypatch):
    (folder / "raw").mkdir()
    texts = [f"The {k}th cat met dog {k * k}.\n\nIt ran." for k in range(120)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "raw" / "train-00000-of-00001.parquet")
    monkeypatch.setattr(owt, "HELD_OUT", 20)
    owt.main([str(folder / "raw"), str(folder)])
    return gpt2_bytes(folder / "tokenizer")


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "prepare"), [("flow_lm1b", of_lm1b), ("flow_owt", of_owt)])
def test_a_recipe_has_a_judges_perplexity_and_an_entropy_at_each_number_of_passes(
    configure, tmp_path, monkeypatch, recipe, prepare
):
    """On a stand-in of its format: a judge of another vocabulary, micro-batches, every stage, the same table from a test."""
    short = [f"experiment={recipe}", f"data.tokenizer={prepare(tmp_path, monkeypatch)}", "logger=none"]
    short += [f"data.{split}={tmp_path}/{split}.jsonl" for split in ("train", "test")]
    short += [f"data.judge.path={tiny_qwen(tmp_path / 'judge')}"]
    short += [*SMALL, "model.num_attention_heads=2", "model.num_key_value_heads=2", "trainer.accumulate_grad_batches=2"]
    short += ["data.sequence_length=16", "data.batch_size=4", "data.max_eval_rows=8", "module.forwards=[1,16]"]
    short += ["teacher.max_steps=2", "trainer.max_steps=6", "trainer.val_check_interval=6", "data.val_fraction=0.05"]
    tables = []
    for mode in ("fit", "test"):
        folder = tmp_path / "out" / recipe / mode
        more = ["mode=test", "ckpt_path=last"] if mode == "test" else []
        getattr(modes, mode)(configure(*short, *more, f"paths.run_dir={folder}"))
        tables.append(json.loads((folder / "record.json").read_text())["rows"])
    figures = [
        {
            (row["decoder"], row["nfe"]): (row["quality"]["judge_perplexity"], row["quality"]["text_entropy"])
            for row in table
        }
        for table in tables
    ]
    passes = {method: [r["nfe"] for r in tables[0] if r["method"] == method] for method in ("student", "teacher")}
    assert {1, 2, 4, 8} <= set(passes["student"])
    assert passes["teacher"] == [1, 16]
    assert {"held-out text", "product of marginals"} <= {decoder for decoder, _ in figures[0]}
    assert all(perplexity > 1 and 0 <= entropy <= math.log(16) + 1e-9 for perplexity, entropy in figures[0].values())
    assert figures[1] == {key: pytest.approx(own) for key, own in figures[0].items()}


def test_a_causal_model_is_adapted_exported_and_answers(configure, tmp_path, capsys):
    short = ["experiment=next_token_qwen", f"model.path={tiny_qwen(tmp_path / 'qwen')}", "logger=none"]
    short += ["trainer.accelerator=cpu", "data=oracle", "data.size=tiny", "module.forwards=[1]"]
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


@pytest.mark.slow
def test_texts_without_a_prompt_are_judged_by_a_model_of_another_run(configure, tmp_path, capsys):
    plain = configure("experiment=meanflow_text")
    small = [*model_overrides(plain, tmp_path), "trainer.max_steps=3", "logger=none", "data.batch_size=4"]
    judge = tmp_path / "out" / "next_token_text" / "run"
    words = "data.vocab_size=2048"
    forwards = "module.forwards=[1,2]"
    modes.fit(configure("experiment=next_token_text", words, f"paths.run_dir={judge}", *small))
    flow = ["experiment=meanflow_text", "teacher.max_steps=2", *FLOWS["noisy_mask_flow"], *small, forwards]
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
    assert all("  (a=" in line for line in first.splitlines())
    fixed = answer(configure(*short, *ask, "plan='b=3 d=0'"), capsys)
    assert re.search(r"  \(a=\d b=3 c=\d d=0\)$", fixed)
    with pytest.raises(UsageError, match="names no type"):
        modes.generate(configure(*short, *ask, "plan='z=3'"))


@pytest.mark.parametrize("name", daily(["concept_qwen", "plan_write_qwen"]))
def test_a_causal_model_of_hugging_face_plans_and_answers(configure, tmp_path, capsys, name):
    plain = configure(f"experiment={name}")
    lengths = ["data.prompt_length=16", "data.response_length=16", "trainer.max_steps=2", "logger=none"]
    small = [*model_overrides(plain, tmp_path), *pairs_overrides(plain, tmp_path), *lengths]
    folder = tmp_path / "out" / name / "first"
    modes.fit(configure(f"experiment={name}", *small, f"paths.run_dir={folder}"))
    assert (folder / "model" / "backbone" / "model.safetensors").is_file()  # adapters added in
    capsys.readouterr()
    modes.generate(configure(f"experiment={name}", *small, "mode=generate", "prompt='jump 3'", "temperature=0"))
    assert "jump 3 → " in capsys.readouterr().out
    if name == "plan_write_qwen":
        with pytest.raises(UsageError, match=r"module\.executor=parallel depends on how many there are"):
            modes.fit(configure(f"experiment={name}", *small, "data.group_by_length=true"))


@pytest.mark.slow
def test_each_stage_runs_alone_from_the_student_of_another(configure, tmp_path):
    stages = ("adapt", "flow", "polish")
    only = {name: [f"module.stages.{other}.share={int(other == name)}" for other in stages] for name in stages}
    short = [*TINY, *FLOWS["noisy_mask_flow"]]
    first = f"{tmp_path}/out/meanflow_llada/adapt"
    modes.fit(configure(*short, *only["adapt"], f"paths.run_dir={first}"))
    second = f"{tmp_path}/out/meanflow_llada/flow"
    modes.fit(configure(*short, *only["flow"], f"paths.run_dir={second}", f"student_path={first}/student"))
    assert (tmp_path / "out" / "meanflow_llada" / "flow" / "student" / "student.safetensors").is_file()
    with pytest.raises(UsageError, match="give both the same module= and module options"):
        modes.fit(configure(*short, *only["flow"], "module.sigma=1.0", f"student_path={first}/student"))


@pytest.mark.slow
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
    assert "NLL, nats a token, of texts by" in printed.replace("\n", " ")
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
