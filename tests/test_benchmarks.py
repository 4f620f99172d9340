"""The benchmarks run at a minimal shape and write what they promise; nothing is asked of their speed."""

import importlib
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from datamodules.oracle.datamodule import OracleDataModule
from datamodules.packed_text import PackedTextDataModule
from models.backbones.causal import build_causal
from models.backbones.causal_lm import load_causal
from models.speculative.block_drafter import BlockDrafter, BlockDrafterOptions
from models.speculative.distribution import MixtureDist
from models.speculative.drafter_files import save_drafter

FOLDER = Path(__file__).parent.parent / "benchmarks"
COMMON = ["--repeats", "2", "--warmup", "1", "--threads", "1", "--device", "cpu"]
SMALL = ["--width", "8", "--layers", "1", "--heads", "2", "--prefix", "2", "--prompt-width", "4"]
SHARED = {"benchmark", "date", "command", "options", "device", "threads", "torch", "commit", "rows", "reading", "table"}


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """A function that runs a benchmark's main at the minimal shape and returns what it wrote."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name: str, *options: str, shape: list[str] = SMALL) -> dict:
        path = tmp_path / f"{name}.json"
        importlib.import_module(name).main([*COMMON, *shape, *options, "--json", str(path)])
        return json.loads(path.read_text())

    return run


def check_layout(result: dict, names: list[str]) -> None:
    assert result.keys() >= SHARED
    assert [row["name"] for row in result["rows"]] == names
    for row in result["rows"]:
        for key in ("seconds", "ratio"):
            found = row[key]
            assert 0 < found["q1"] <= found["median"] <= found["q3"]
            assert all(map(math.isfinite, found.values()))
    assert result["rows"][0]["ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    typed = result["command"].split()
    assert typed[:2] == ["python", f"benchmarks/{result['benchmark']}.py"]
    assert typed[2 : 2 + len(COMMON)] == COMMON
    assert "--json" not in typed
    assert [len(cells) for cells in result["table"]["rows"]] == [len(result["table"]["columns"])] * len(names)


def test_job_parts(benchmark, tmp_path, capsys):
    """Every part of a job of each stage is found, the seconds of nested parts are counted once, and nothing stays replaced."""
    from lightning_modules.noisy_mask_flow import NoisyMaskFlowModule

    original = NoisyMaskFlowModule.stage_terms
    sizes = ["data.size=tiny", "data.batch_size=8", "data.train_rows=64", "data.val_rows=8", "data.test_rows=8"]
    sizes += ["model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16", "teacher.max_steps=2"]
    sizes += ["teacher.module.optimizer=adamw"]
    sizes += ["trainer.max_steps=6", "trainer.val_check_interval=3", "module.ode_steps=2", "trainer.accelerator=cpu"]
    sizes += ["module.forwards=[1]", "module.student_forwards=[1]", "module.ode_forwards=[2]", "logger=none"]
    places = [f"paths.output_dir={tmp_path}/o", f"paths.cache_dir={tmp_path}/c"]
    result = benchmark("job_parts", "experiment=meanflow_llada", *sizes, *places, "--clock", "cpu", shape=[])
    assert result.keys() >= SHARED
    calls = {row["name"]: row["calls"] for row in result["rows"]}
    assert calls["teacher: forward"] == calls["teacher: backward"] == 2
    assert sum(calls[f"{stage}: forward"] for stage in ("adapt", "flow", "polish")) == 6
    assert calls["optimizer: AdamW"] == 2 + 6
    assert calls["optimizer: Muon"] == 6
    assert calls["polish: making pairs"] == 1
    assert calls["comparison: teacher"] == 1
    assert calls["comparison: student"] == 2  # the student and its denoiser's flow
    assert sum(row["share"] for row in result["rows"]) == pytest.approx(1)
    assert all(row["seconds"] >= 0 for row in result["rows"])
    assert NoisyMaskFlowModule.stage_terms is original
    assert "adapt: targets over recent texts" in capsys.readouterr().out


def test_seconds_of_nested_parts_are_counted_once(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    parts = importlib.import_module("job_parts").Parts(iter([0.0, 1.0, 4.0, 4.5, 5.5, 10.0]).__next__)
    inner = parts.timed(lambda: None, lambda: "inner")
    parts.timed(lambda: (inner(), inner()), lambda: "outer")()
    assert parts.seconds == {"inner": 3.0 + 1.0, "outer": 10.0 - 4.0}
    assert parts.calls == {"inner": 2, "outer": 1}


def test_meanflow_step(benchmark, capsys):
    result = benchmark("meanflow_step", "--batch", "8", "--length", "10", "--vocabulary", "11")
    check_layout(
        result,
        [
            "(a) plain distillation",
            "(b) mean flow",
            "(c) (b) with ordinary nn.Linear",
            "(d) (b) with every row's derivative",
            "(e) (b) with finite differences",
        ],
    )
    assert all(row["peak_bytes"] > 0 for row in result["rows"])
    assert result["difference_from_b"]["(c) (b) with ordinary nn.Linear"] < 1e-3
    assert 1e-8 < result["difference_from_b"]["(e) (b) with finite differences"] < 0.5
    assert len(result["parts"]) == 4
    assert all(part["plain"] > 0 and part["meanflow"] > 0 and math.isfinite(part["more"]) for part in result["parts"])
    printed = capsys.readouterr().out
    assert "Time of each part" in printed
    assert "[1.000, 1.000]" in printed


def test_meanflow_step_refuses_to_time_different_computations(benchmark, monkeypatch):
    step = importlib.import_module("meanflow_step")
    build = step.build_variants

    def with_one_weight_changed(*args):
        variants = build(*args)
        variants[step.NO_SPLIT].student.soft_prompt.gate.data += 1.0
        return variants

    monkeypatch.setattr(step, "build_variants", with_one_weight_changed)
    with pytest.raises(SystemExit, match=r"\(d\).*differs from \(b\)"):
        benchmark("meanflow_step", "--batch", "8", "--length", "10", "--vocabulary", "11")


def test_decoding(benchmark):
    sizes = ["--vocabulary", "11", "--prompt", "2", "--response", "4", "--forwards", "1", "2", "--batch", "1", "3"]
    result = benchmark("decoding", *sizes)
    check_layout(result, ["student", "teacher, 1 forward", "teacher, 2 forwards"] * 2)
    assert [(row["batch"], row["forwards"]) for row in result["rows"]] == [
        (1, 1),
        (1, 1),
        (1, 2),
        (3, 1),
        (3, 1),
        (3, 2),
    ]
    for row in result["rows"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * 4 / row["seconds"]["median"])


def test_masked_cache(benchmark):
    sizes = ["--vocabulary", "11", "--prompt", "2", "--response", "8", "--block", "4", "--batch", "2", "--steps", "2"]
    result = benchmark("masked_cache", *sizes)
    check_layout(result, ["none", "prefix", "dual"])
    none, prefix, dual = result["rows"]
    assert (none["flops"], none["same_tokens"]) == (1.0, 1.0)
    assert 1 > prefix["flops"] > dual["flops"] > 0
    assert all(0 <= row[name] <= 1 for row in result["rows"] for name in ("same_tokens", "valid"))
    exact = benchmark("masked_cache", *sizes, "--refresh", "1")["rows"]
    assert [row["same_tokens"] for row in exact] == [1.0, 1.0, 1.0]


def test_lightning_overhead(benchmark):
    result = benchmark("lightning_overhead", "--batch", "4", "--size", "tiny")
    names = ["loop by hand", "Lightning", "Lightning, logging", "Lightning, logging, weight average"]
    check_layout(result, [*names, "the default job without files"])
    assert result["losses"].keys() == {row["name"] for row in result["rows"]}
    assert len(set(result["losses"].values())) == 1  # every loop took the same steps
    assert all(math.isfinite(row["more_seconds"]["median"]) for row in result["rows"])


def test_trainer_overhead(benchmark):
    """Both loops take the same steps over two epochs and a validation each."""
    small = [*("model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16", "data.size=tiny")]
    rows = ["data.train_rows=64", "data.batch_size=16", "data.val_rows=16", "trainer.val_check_interval=3"]
    options = ["--repeats", "6", "--methods", "masked diffusion", "--options", *small, *rows, "module.forwards=[1]"]
    result = benchmark("trainer_overhead", *options, shape=[])
    check_layout(result, ["masked diffusion, by hand", "masked diffusion, the experiment"])
    assert result["rows"][0]["all"] == 1.0
    assert all(math.isfinite(row["monitors"]) and row["all"] > 0 for row in result["rows"])


def test_trainer_overhead_refuses_to_time_different_steps(benchmark, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    bench = importlib.import_module("trainer_overhead")
    monkeypatch.setattr(bench, "_step", lambda *_: torch.tensor(1e3))
    small = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16", "data.size=tiny"]
    options = [
        "--repeats",
        "2",
        "--methods",
        "next token",
        "--options",
        *small,
        "data.train_rows=256",
        "data.batch_size=16",
    ]
    with pytest.raises(SystemExit, match="not the same steps"):
        benchmark("trainer_overhead", *options, shape=[])


def test_start_up(benchmark):
    result = benchmark("start_up", "--only", "help", "--clock", "cpu", shape=[])
    check_layout(result, ["run.py --help"])


def check_finite(rows: list[dict]) -> None:
    for row in rows:
        assert all(math.isfinite(value) and value > 0 for part in ("seconds", "ratio") for value in row[part].values())


def test_concept_online(benchmark):
    """The arithmetic by hand; both kinds of commits; the rate that a router was brought to."""
    sizes = ["--width", "128", "--split", "1", "2", "1", "--vocabulary", "40", "--codes", "8"]
    options = ["--batch", "2", "--prompt", "16", "--new", "8", "--compression", "2", "--growth", "fixed", "null"]
    result = benchmark("concept_online", *options, shape=sizes)
    assert [row["name"] for row in result["rows"]] == [
        n for n in ("every layer", "fixed, R = 2", "null, R = 2") for _ in "pd"
    ]
    fixed, null = result["rows"][2], result["rows"][4]
    layer, new = 128 * (128 + 64 + 64 + 128 + 3 * 384), 128 * 128
    told = 128 * 128 * 1.5  # every token of the concept before it, every second one of its tail
    assert fixed["realised"] == 2
    assert fixed["expected"] == pytest.approx((3 * layer + told + 40 * 128 + new + 4 * 128) / (4 * layer + 40 * 128))
    assert fixed["expected_kv"] == pytest.approx((1 + 3 / 2 + 0.5 / 24) / 4)
    assert fixed["kv_share"] == pytest.approx((24 + 2 * 12 + 12) / (4 * 24))  # the last of 24 tokens commits: no tail
    assert 1.2 < null["realised"] < 4
    assert all(row["tokens_per_s"] > 0 for row in result["rows"])


@pytest.mark.parametrize(("limit", "wanted"), [(1000, 8), (999, 4), (125, 1), (124, 0), (1e9, 64)])
def test_the_largest_batch_is_the_last_power_of_two_within_a_limit(monkeypatch, limit, wanted):
    monkeypatch.syspath_prepend(str(FOLDER))
    from full_batch import largest_batch

    tried = []

    def peak_of(batch):
        tried.append(batch)
        return 125 * batch

    assert largest_batch(peak_of, limit, most=64) == wanted
    assert tried == [2**k for k in range(len(tried))]
    assert len(tried) == (wanted.bit_length() + 1 if wanted < 64 else 7)  # one that does not fit ends it


def test_a_device_that_runs_out_of_memory_ends_the_search(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from full_batch import largest_batch

    def peak_of(batch):
        if batch > 16:
            raise torch.OutOfMemoryError("full")
        return None

    assert largest_batch(peak_of, None) == 16


@pytest.mark.slow
def test_decoding_at_the_batch_that_fills_a_stated_memory(benchmark, capsys):
    sizes = ("--vocabulary", "11", "--prompt", "2", "--response", "4", "--forwards", "1")
    small, large = (
        max(row["batch"] for row in benchmark("decoding", "--batch", "1", "--fill", "--memory", gib, *sizes)["rows"])
        for gib in ("0.0001", "0.0008")
    )
    assert 1 <= small < large <= 16 * small
    assert f"largest batch that fits: {large}" in capsys.readouterr().out
    for wrong in (("--fill",), ("--fill", "--memory", "0.0000001")):
        with pytest.raises(SystemExit):
            benchmark("decoding", *wrong, *sizes)
    assert "needs --memory GIB" in (said := capsys.readouterr().err)
    assert "not one row fits" in said


def test_qstar_decoding(benchmark):
    sizes = ["--width", "16", "--layers", "3", "--trunk", "1", "--heads", "2", "--vocabulary", "11"]
    result = benchmark("qstar_decoding", "--batch", "1", "2", "--prompt", "3", "--new", "8", shape=sizes)
    check_finite(result["rows"])
    schemes = [row for row in result["rows"] if "beta" in row]
    equal = ["draft=theta", "draft=alternate", "draft=assistant"]
    assert [row["name"] for row in schemes] == [*equal, *equal[:2]] * 2
    for row in schemes:
        assert 0 <= row["beta"] <= 1
        assert row["formula"] > 0
        assert row["speedup"] == pytest.approx(1 / row["ratio"]["median"])
    peers = [row for row in result["rows"] if "tokens_per_forward" in row]
    assert [row["tokens_per_forward"] for row in peers[::3]] == [1.0, 1.0]
    assert all(row["tokens_per_forward"] >= 1 for row in peers)


def small_causal(folder, tokenizer_of, seed: int) -> Path:
    """A causal model of the corpus' vocabulary, with random weights, as a plain folder."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    build_causal(**tokenizer_of.special_ids(), **sizes, max_position_embeddings=64, rope_theta=1e4).save_pretrained(
        folder
    )
    tokenizer_of.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("alone", [True, False])
def test_block_drafts(benchmark, tmp_path, alone):
    data = OracleDataModule(size="tiny", style=0.5, train_rows=64, val_rows=16, test_rows=16)
    data.setup()
    folders = {
        name: small_causal(tmp_path / name, data, seed) for seed, name in enumerate(("theta", "target", "small"))
    }
    models = {name: load_causal(folders[name]).eval() for name in (["theta"] if alone else ["theta", "target"])}
    drafter = BlockDrafter(models, BlockDrafterOptions(draft_length=3, window=6, rank=4), len(data.tokenizer))
    save_drafter(drafter, models, tmp_path / "drafter")
    options = ["data=oracle", "data.size=tiny", "data.train_rows=64", "data.val_rows=16", "data.test_rows=16"]
    if alone:
        options = ["experiment=block_draft_causal", f"model.path={folders['theta']}", *options]
    else:
        paths = [f"pair.{name}.path={folders[name]}" for name in models]
        options = ["experiment=block_draft_oracle", *paths, *options]
    folder, small = (str(tmp_path / name) for name in ("drafter", "small"))
    more = ["--drafter", folder, "--assistant", small, "--batch", "1", "2", "--rounds", "2", "1"]
    result = benchmark("block_drafts", *more, "--options", *options, "trainer.accelerator=cpu", shape=[])
    check_finite(result["rows"])
    own = ["no drafts", "n-grams, auto", "n-grams of 4", "blocks of 3", "blocks, auto"]
    own[3:3] = [] if alone else ["π_θ drafts, auto", "alternating, auto"]
    peers = ["transformers, no drafts", "transformers, prompt lookup", "transformers, assisted"] if alone else []
    assert [row["name"] for row in result["rows"]] == [*own, *peers, *own, *peers[:1]]
    assert [row["batch"] for row in result["rows"]] == [1] * len([*own, *peers]) + [2] * len([*own, *peers[:1]])
    for row in result["rows"]:
        assert row["tokens"] > 0
        assert row["speedup"] == pytest.approx(1 / row["ratio"]["median"])
        assert row["ratio"] == row["wall_ratio"]
    naive, blocks = result["rows"][0], result["rows"][own.index("blocks of 3")]
    assert (naive["tokens_per_forward"], naive["accepted_length"]) == (1.0, 0.0)
    assert 1 <= blocks["tokens_per_forward"] <= 1 + 3


@pytest.mark.parametrize("greedy", [True, False])
def test_all_ways_sample_as_the_module_does(monkeypatch, tmp_path, greedy):
    """Whatever the model's folder says of generation. With top_k=1 samples are the most probable tokens too."""
    monkeypatch.syspath_prepend(str(FOLDER))
    benchmark = importlib.import_module("block_drafts")
    data = OracleDataModule(size="tiny", style=0.5, train_rows=64, val_rows=16, test_rows=16)
    data.setup()
    model = load_causal(small_causal(tmp_path / "theta", data, 0)).eval()
    model.generation_config = GenerationConfig(do_sample=True, temperature=9.0, top_p=0.1, repetition_penalty=1e4)
    mixture = MixtureDist(1.0, temperature=0.7, top_k=1, top_p=0.9)
    module, args = (
        SimpleNamespace(theta=model, target=model, mixture=mixture),
        Namespace(greedy=greedy, lookup=4, assistant=None),
    )
    # 1. ours
    used, decoder = [], benchmark.QStarDecoder
    monkeypatch.setattr(
        benchmark, "QStarDecoder", lambda *given, **more: used.append(given[3].mixture) or decoder(*given, **more)
    )
    benchmark.our_ways(module, data, None, args)
    wanted = MixtureDist(1.0, top_k=1) if greedy else mixture
    assert used == [wanted] * len(used) != []
    # 2. those of transformers
    rows, calls, generate = benchmark.prompts_at(data, [0]), [], model.generate
    model.generate = lambda ids, **more: calls.append((ids, more, generate(ids, **more))) or calls[-1][2]
    ways = benchmark.ways_of_transformers(module, data, 1, args)
    for way in ways.values():
        way(rows, 0)
    for ids, more, text in calls:
        asked = {name: more.get(name) for name in ("do_sample", "temperature", "top_k", "top_p")}
        cut = (
            {"temperature": None, "top_k": None, "top_p": None}
            if greedy
            else {"temperature": 0.7, "top_k": 1, "top_p": 0.9}
        )
        assert asked == {"do_sample": not greedy} | cut
        for length in range(ids.shape[1], text.shape[1]):
            assert text[0, length] == model(text[:, :length]).logits[0, -1].argmax()
    assert len(calls) == 2


def test_block_drafts_of_text_continue_the_first_half_of_each_row(benchmark, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of a text about {n * n % 97}\n" for n in range(200)))
    sizes = {
        "cut": "line",
        "tokenizer": "byte",
        "vocab_size": 600,
        "sequence_length": 12,
        "batch_size": 4,
        "eval_batch_size": 4,
    }
    data = PackedTextDataModule(name="text", train=str(text), cache_dir=tmp_path / "cache", **sizes)
    data.setup()
    folder = small_causal(tmp_path / "theta", data, 0)
    options = ["experiment=block_draft_causal", f"model.path={folder}", f"data.train={text}", "data.cut=line"]
    options += ["data.sequence_length=12", f"paths.cache_dir={tmp_path}/cache", "trainer.accelerator=cpu"]
    rows = benchmark("block_drafts", "--options", *options, shape=[])["rows"]
    check_finite(rows)
    assert [row["name"] for row in rows][:2] == ["no drafts", "n-grams, auto"]
    assert all(0 < row["tokens"] <= 2 * 6 for row in rows)


def finished_run(name: str, weights: str, tmp_path: Path) -> list[str]:
    """Options of a small run that is kept among the tests."""
    folder = FOLDER.parent / "tests" / "fixtures" / "first_formats" / name
    options = json.loads((folder / "overrides.json").read_text())
    if (folder / "teacher").is_dir():
        options.append(f"teacher.path={folder / 'teacher'}")
    kept = folder / ("last.ckpt" if weights == "ckpt_path" else "student")
    return [*options, f"{weights}={kept}", f"paths.cache_dir={tmp_path}/cache", "trainer.accelerator=cpu"]


def test_frontier_time(benchmark, tmp_path):
    runs = ["--run", "a plan", *finished_run("plans", "ckpt_path", tmp_path)]
    runs += ["--run", "flow", *finished_run("noisy_mask", "student_path", tmp_path)]
    result = benchmark("frontier_time", *runs, "--batch", "4", "1", "--rounds", "2", "1", shape=[])
    names = ["a plan: plan sampled, text sampled", "flow: teacher, sampled"]
    names += ["flow: student, NFE 1", "flow: student, NFE 2", "flow: denoiser's flow"]
    check_layout(result, names)
    check_finite([{key: row[key] for key in ("seconds", "ratio", "seconds 1", "ratio 1")} for row in result["rows"]])
    assert [row["forwards"] for row in result["rows"]] == [4 + 6, 1, 1, 2, 2]  # a concept or a token a pass
    assert result["table"]["columns"][:4] == ["decoder", "NFE", "valid", "TV"]
    assert all(0 <= row["quality"]["validity"] <= 1 for row in result["rows"])


def test_frontier_time_scores_the_texts_of_the_rounds_that_count(monkeypatch):
    """Each round has the next prompts, and the first prompts again where all were read."""
    monkeypatch.syspath_prepend(str(FOLDER))
    frontier = importlib.import_module("frontier_time")
    rows = {"input_ids": torch.arange(10).reshape(5, 2)}
    read = []

    def decoder(few, generator):
        read.append(few["input_ids"][:, 0].tolist())
        return few["input_ids"] + torch.randint(100, 200, (1,), generator=generator)

    decoder.forwards = 3
    args = Namespace(warmup=2, seed=7, device="cpu", clock="wall")
    trials, lines = frontier.measure({"one": decoder}, rows, 2, 3, args)
    assert read == [[0, 2]] * 2 + [[0, 2], [4, 6], [8, 0]]
    drawn = [int(torch.randint(100, 200, (1,), generator=torch.Generator().manual_seed(7 + k))) for k in range(3)]
    scored = []
    data = SimpleNamespace(scorer=lambda *given: scored.append(given) or SimpleNamespace(quality={"validity": 0.5}))
    assert trials["one"].quality(data) == {"validity": 0.5}
    assert scored[0][0]["input_ids"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [0, 1]]
    assert (scored[0][1] - scored[0][0]["input_ids"])[:, 0].tolist() == [k for k in drawn for _ in range(2)]
    assert trials["one"].forwards == 3
    assert lines["one"]["ratio"]["median"] == 1


def test_frontier_time_refuses_runs_that_cannot_be_compared(benchmark, tmp_path):
    plans = finished_run("plans", "ckpt_path", tmp_path)
    with pytest.raises(
        SystemExit, match=r"test rows of --run other are not those of --run one; give both the same data"
    ):
        benchmark("frontier_time", "--run", "one", *plans, "--run", "other", *plans, "seed=1", shape=[])
    with pytest.raises(
        SystemExit, match="--run one needs the weights of a finished run; type ckpt_path=FILE or student"
    ):
        benchmark("frontier_time", "--run", "one", *[o for o in plans if not o.startswith("ckpt_path")], shape=[])


def test_qstar_solver(benchmark):
    result = benchmark("qstar_solver", "--vocabulary", "3000", "--rows", "2", shape=[])
    check_finite(result["rows"])
    assert [row["name"] for row in result["rows"]] == ["solve_alpha", "20 bisections", "one read"] * 3
    for solver, halved in zip(result["rows"][::3], result["rows"][1::3], strict=True):
        assert solver["gap"] < 1e-6
        assert solver["passes"] < halved["passes"]


def test_concept_planning(benchmark):
    sizes = ["--width", "8", "--layers", "1", "--heads", "2", "--vocabulary", "11", "--codes", "3", "--most", "2"]
    shape = [*sizes, "--types", "2", "--batch", "2", "--prompt", "2", "--response", "3"]
    result = benchmark("concept_planning", shape=shape)
    check_finite(result["rows"])
    assert [row["name"] for row in result["rows"]] == ["sequential", "types", "slots"] * 2
    assert 0 <= result["largest_difference"] < 1e-3


def test_concept_planning_refuses_to_time_different_computations(benchmark, monkeypatch):
    planning = importlib.import_module("concept_planning")
    build = planning.build_model
    monkeypatch.setattr(planning, "build_model", lambda args, types, device: build(args, types + 1, device))
    with pytest.raises(SystemExit, match="one type beside no other differs"):
        benchmark(
            "concept_planning", "--batch", "2", "--types", "1", shape=["--width", "8", "--layers", "1", "--heads", "2"]
        )


def test_packed_loader(benchmark):
    result = benchmark(
        "packed_loader", "--length", "16", "--batch", "3", "--batches", "4", "--documents", "30", shape=[]
    )
    check_layout(result, ["sliced by hand", "loader", "loader, document_mask", "loader, one worker", "training step"])
    for row in result["rows"]:
        assert row["tokens_per_s"] == pytest.approx(4 * 3 * 16 / row["seconds"]["median"])
        assert 0 < row["rate"]["q1"] <= row["rate"]["median"] <= row["rate"]["q3"]


def test_packed_loader_refuses_to_time_other_rows(benchmark, monkeypatch):
    monkeypatch.setattr("datamodules.packing.PackedRows.__getitems__", lambda *_: {"input_ids": torch.zeros(3, 16)})
    with pytest.raises(SystemExit, match="row 0 of the loader is not the slice by hand"):
        benchmark("packed_loader", "--documents", "30", shape=[])


def test_a_loop_that_fails_says_so(benchmark):
    from turns import Stepper

    def broken(pause) -> None:
        pause(torch.tensor(1.0))
        raise ValueError("in the second step")

    stepper = Stepper(broken)
    stepper.step()
    with pytest.raises(ValueError, match="in the second step"):
        stepper.step()


def test_a_loop_that_is_over_is_not_waited_for(benchmark):
    from turns import Stepper

    stepper = Stepper(lambda pause: pause(torch.tensor(1.0)))
    stepper.step()
    stepper.step()  # after its one step the loop ends
    with pytest.raises(RuntimeError, match="the training was over after 1 steps"):
        stepper.step()
    stepper.finish()


def test_peak_memory_on_a_cpu_counts_what_is_alive_at_once(benchmark):
    from timing import peak_bytes

    mebibyte = 2**18  # float32 numbers

    def in_turn() -> None:
        for _ in range(3):
            torch.empty(mebibyte)

    def together() -> None:
        _ = [torch.empty(mebibyte) for _ in range(3)]

    assert peak_bytes(in_turn, torch.device("cpu")) == 2**20
    assert peak_bytes(together, torch.device("cpu")) == 3 * 2**20


def test_rounds_alternate_and_warmup_does_not_count(benchmark):
    from timing import interleave, quartiles

    order = []
    measures = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    assert interleave(measures, repeats=2, warmup=1) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert order == list("ababab")
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}


def test_the_command_of_a_record_is_without_the_file_it_was_written_to(benchmark):
    typed = ["--json", "a.json", "--threads", "1", "--json=b.json", "--methods", "next token"]
    found = importlib.import_module("timing").command_of("decoding", typed)
    assert found == "python benchmarks/decoding.py --threads 1 --methods 'next token'"


@pytest.mark.slow
def test_a_script_runs_from_the_command_line():
    command = [sys.executable, str(FOLDER / "decoding.py"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}  # this checkout, whichever one is installed
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


@pytest.mark.slow
def test_every_measurement_for_a_gpu_works(tmp_path):
    """At the smallest sizes on the CPU, so that none fails for the first time where a GPU is."""
    ran = subprocess.run(
        ["bash", str(FOLDER / "gpu.sh"), str(tmp_path)],
        env={**os.environ, "SHORT": "1", "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    summary = (tmp_path / "summary.txt").read_text()
    assert ran.returncode == 0, summary
    names = [line.split(":")[0] for line in summary.splitlines()]
    assert len(names) == len(set(names)) == 9
    assert all(": done (" in line for line in summary.splitlines())
    for name in names[:7]:
        assert json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    broken = subprocess.run(["bash", str(FOLDER / "gpu.sh")], capture_output=True, text=True, check=False)
    assert broken.returncode == 2
    assert "gpu.sh FOLDER" in broken.stdout
