"""The record, the table, the words and the figure that a run ends with, from decoders whose quality is known beforehand."""

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.record import COST_KEYS
from helpers.trainer import quiet_trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from callbacks.frontier import FrontierReport
from lightning_modules.base import LeapModule
from lightning_modules.training import decoder_cost
from reporting.record import KEYS, read_record
from reporting.table import markdown_table

ROW_KEYS = {"method", "decoder", "nfe", "quality", "entropy", "distinct", "cost", "n_samples", "ci95"}


# -- a run with decoders whose quality is known ----------------------------------------------------------------------


class Spoiler:
    """The corpus' own texts, with the first word of every `every`-th row made unsayable: its validity is known by hand."""

    def __init__(self, name: str, method: str, forwards: int, every: int | None = None, wait=lambda: None) -> None:
        self.name, self.method, self.forwards, self.every, self.wait = name, method, forwards, every, wait

    def __call__(self, rows, generator):
        self.wait()
        responses = rows["input_ids"][rows["response_mask"]].view(len(rows["input_ids"]), -1).clone()
        if self.every is not None:
            responses[:: self.every, 0] = 3  # <unk>
        return responses


class Comparison(LeapModule):
    """A module with one weight and the decoders that it is given."""

    def __init__(self, decoders: list) -> None:
        super().__init__(lr=0.1, weight_decay=0.0, warmup_steps=1, seed=5)
        self.weight, self._given = torch.nn.Parameter(torch.ones(1)), decoders

    def training_step(self, batch, batch_idx):
        loss = self.weight.square().sum()
        self.log("train/loss", loss)
        return loss

    def decoders(self):
        return self._given


def known_decoders(wait=lambda: None) -> list[Spoiler]:
    return [
        Spoiler("teacher, sampled", "teacher", 1, 1, wait),
        Spoiler("teacher, sampled", "teacher", 4, 4, wait),
        Spoiler("student, greedy", "student", 1, 2, wait),
    ]


def compare(folder: Path, data, decoders: list | None = None, **options) -> tuple[FrontierReport, Comparison]:
    report = FrontierReport(str(folder), "trial", {"seed": 5, "module": {"lr": 0.1}}, samples=2)
    module = Comparison(decoders or known_decoders())
    quiet_trainer(1, callbacks=[report], **options).test(module, data, verbose=False)
    return report, module


def refuse(constant: str):
    raise AssertionError(f"{constant} is not JSON")


def test_record_has_every_key_of_the_schema_and_is_valid_json(tmp_path, tiny_oracle):
    report, _ = compare(tmp_path / "run", tiny_oracle)
    text = (tmp_path / "run" / "record.json").read_text()
    record = json.loads(text, parse_constant=refuse)
    assert tuple(record) == ("format", *KEYS, "aup", "texts")
    assert record == json.loads(json.dumps(report.record))
    assert record["config"] == {"seed": 5, "module": {"lr": 0.1}}
    assert (record["experiment"], record["seed"]) == ("trial", 5)
    assert record["versions"]["torch"] == metadata.version("torch")
    assert record["data"] == tiny_oracle.facts()
    assert [row["method"] for row in record["rows"]] == ["teacher", "teacher", "student", "control", "control"]
    for row in record["rows"]:
        assert set(row) == ROW_KEYS
        assert set(row["cost"]) == COST_KEYS
        assert row["n_samples"] == 32
        assert row["cost"]["batch"] == 16
        for name, (low, high) in row["ci95"].items():
            assert low <= row["quality"][name] <= high
    assert read_record(tmp_path / "run" / "record.json") == record
    assert (tmp_path / "run" / "frontier.png").stat().st_size > 5000


def test_rows_equal_scoring_the_decoders_output_directly(tmp_path, tiny_oracle):
    """Two batches of 16: what the report collected is what the scorer says of all 32 answers at once."""
    report, module = compare(tmp_path, tiny_oracle)
    batches = list(tiny_oracle.test_dataloader())
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    decoders = [*module.decoders(), *tiny_oracle.controls()]
    for k, (row, decoder) in enumerate(zip(report.record["rows"], decoders, strict=True)):
        answers = [decoder(batch, module.step_generator(n, stream=100 + k)) for n, batch in enumerate(batches)]
        score = tiny_oracle.scorer(rows, torch.cat(answers))
        assert row["quality"] == score.quality
        assert (row["entropy"], row["distinct"]) == (score.entropy, score.distinct)
        assert row["ci95"] == {name: list(interval) for name, interval in score.ci95.items()}
        assert (row["decoder"], row["method"], row["nfe"]) == (decoder.name, decoder.method, decoder.forwards)
    validity = [row["quality"]["validity"] for row in report.record["rows"]]
    assert validity[:3] == [0.0, 0.75, 0.5]  # every row, every fourth and every second were spoilt
    assert validity[4] == 1.0


def test_times_of_a_batch_and_of_a_text_alone(tmp_path, tiny_oracle, monkeypatch):
    """A clock by which the first batch takes 100 seconds, the second one 2, and texts alone 50, then 7, 3 and 4."""
    now, calls = [0.0], [0]
    # the first batch is decoded again to count its operations
    durations = [100.0, 100.0, 50.0, 7.0, 3.0, 4.0, 2.0]

    def wait():
        now[0] += durations[calls[0]]
        calls[0] += 1

    monkeypatch.setattr(decoder_cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    report, _ = compare(tmp_path, tiny_oracle, [Spoiler("student", "student", 3, None, wait)])
    student, *controls = report.record["rows"]
    assert calls[0] == 7
    cost = student["cost"]
    assert cost["tokens_per_s"] == 16 * tiny_oracle.response_length / 2.0
    assert (cost["batch"], cost["seconds_per_batch"], cost["nfe_per_batch"]) == (16, 2.0, 3)
    assert cost["seconds_alone"] == 4.0  # the median, without the first
    assert cost["first_token_seconds"] is None  # all tokens come together
    timed = ("tokens_per_s", "seconds_per_batch", "nfe_per_batch", "seconds_alone", "first_token_seconds")
    assert all(row["cost"][name] is None for row in controls for name in timed)  # no network, nothing to time


def test_a_shortened_run_writes_nothing(tmp_path, tiny_oracle, capsys):
    report, _ = compare(tmp_path / "run", tiny_oracle, fast_dev_run=True)
    assert report.record["rows"][0]["n_samples"] == 16
    assert not (tmp_path / "run").exists()
    assert "Figure" not in capsys.readouterr().out


def test_report_says_what_was_generated_and_what_is_wrong_with_it(tmp_path, tiny_oracle, capsys):
    compare(tmp_path, tiny_oracle)
    printed = capsys.readouterr().out
    for text in ("teacher, sampled, NFE 1", "teacher, sampled, NFE 4", "student, greedy, NFE 1", "resampling floor"):
        assert text in printed
    prompts = tiny_oracle.decode_prompts({k: v[:2] for k, v in tiny_oracle.rows["test"].columns.items()})
    assert all(prompt in printed for prompt in prompts)
    assert "word 1" in printed
    assert "trial on oracle-tiny, seed 5" in printed
    assert printed.splitlines()[-1] == (
        f"One forward pass: 50.0 % valid; the teacher with one: 0.0 %, with 4: 75.0 %. Figure: {tmp_path}/frontier.png"
    )


def test_a_record_has_the_first_texts_of_each_decoder(tmp_path, tiny_oracle):
    report, _ = compare(tmp_path, tiny_oracle)
    names = ["teacher, sampled, NFE 1", "teacher, sampled, NFE 4", "student, greedy, NFE 1", "product of marginals"]
    texts = report.record["texts"]
    assert [text["decoder"] for text in texts[::2]] == [*names, "resampling floor"]
    first = {k: v[:2] for k, v in tiny_oracle.rows["test"].columns.items()}
    assert [text["prompt"] for text in texts] == 5 * tiny_oracle.decode_prompts(first)
    truth = tiny_oracle.decode_responses(first["input_ids"][first["response_mask"]].view(2, -1))
    spoilt = dict.fromkeys(("teacher, sampled, NFE 1", "teacher, sampled, NFE 4"))
    answers = {name: [t["response"] for t in texts if t["decoder"] == name] for name in spoilt}
    assert answers["teacher, sampled, NFE 4"][1] == truth[1]
    assert truth[0] not in answers["teacher, sampled, NFE 1"]
    faults = [text["fault"] for text in texts if text["decoder"] == "teacher, sampled, NFE 4"]
    assert "word 1" in faults[0]
    assert faults[1] == ""


def test_tensorboard_gets_the_figure_the_texts_and_the_scalars(tmp_path, tiny_oracle):
    told = {"seed": 3, "module": {"_target_": "x", "lr": 0.1, "stages": {"flow": {"share": 0.5}}}, "paths": {"a": "b"}}
    report = FrontierReport(str(tmp_path), "trial", told)
    logger = TensorBoardLogger(str(tmp_path), name="board", version="run", default_hp_metric=False)
    trainer = quiet_trainer(3, callbacks=[report], logger=logger, log_every_n_steps=1)
    module = Comparison(known_decoders())
    trainer.fit(module, tiny_oracle.train_dataloader())
    trainer.test(module, tiny_oracle, verbose=False)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "board" / "run"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2]
    (image,) = events.Images("frontier")
    assert (image.step, image.encoded_image_string[:4]) == (3, b"\x89PNG")
    (results,) = events.Tensors("results/text_summary")
    assert results.tensor_proto.string_val[0].decode() == markdown_table(report.record)
    (samples,) = events.Tensors("samples/text_summary")
    assert "| student, greedy, NFE 1 |" in samples.tensor_proto.string_val[0].decode()
    session = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert {"seed", "module.lr", "module.stages.flow.share"} == set(session.hparams)
    student = next(row for row in report.record["rows"] if row["method"] == "student")
    (valid,) = events.Scalars("result/validity")
    assert valid.value == pytest.approx(student["quality"]["validity"])
