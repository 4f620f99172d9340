"""The record, the table, the words and the figure that a run ends with, from decoders whose quality is known beforehand."""

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_trainer import quiet_trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import lightning_modules.base
from callbacks import record as record_file
from callbacks.frontier import FrontierReport
from callbacks.picture import quality_figure
from callbacks.record import KEYS, find_records, read_record, write_record
from callbacks.table import COLUMNS, DISPENSABLE, in_words, markdown_table, results_table
from lightning_modules.base import LeapModule
from models.functional.errors import UsageError

ROW_KEYS = {"method", "decoder", "forwards", "quality", "entropy", "distinct", "cost", "n_samples", "ci95"}
COST_KEYS = {"tokens_per_s", "flops_per_token", "peak_memory_bytes", "batch"}


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
    assert tuple(record) == KEYS
    assert record == json.loads(json.dumps(report.record))
    assert record["config"] == {"seed": 5, "module": {"lr": 0.1}}
    assert (record["experiment"], record["seed"]) == ("trial", 5)
    assert record["versions"]["torch"] == torch.__version__
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
        assert (row["decoder"], row["method"], row["forwards"]) == (decoder.name, decoder.method, decoder.forwards)
    validity = [row["quality"]["validity"] for row in report.record["rows"]]
    assert validity[:3] == [0.0, 0.75, 0.5]  # every row, every fourth and every second were spoilt
    assert validity[4] == 1.0


def test_tokens_per_second_leaves_the_first_batch_out(tmp_path, tiny_oracle, monkeypatch):
    """A clock by which the first batch takes 100 seconds and the second one 2."""
    now, calls = [0.0], [0]

    def wait():
        calls[0] += 1
        now[0] += 100.0 if calls[0] <= 2 else 2.0  # the first batch is decoded again to count its operations

    monkeypatch.setattr(lightning_modules.base, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    report, _ = compare(tmp_path, tiny_oracle, [Spoiler("student", "student", 1, None, wait)])
    student, *controls = report.record["rows"]
    assert calls[0] == 3
    assert student["cost"]["tokens_per_s"] == 16 * tiny_oracle.response_length / 2.0
    assert all(row["cost"]["tokens_per_s"] is None for row in controls)  # no network, nothing to time


def test_a_shortened_run_writes_nothing(tmp_path, tiny_oracle):
    report, _ = compare(tmp_path / "run", tiny_oracle, fast_dev_run=True)
    assert report.record["rows"][0]["n_samples"] == 16
    assert not (tmp_path / "run").exists()


def test_report_says_what_was_generated_and_what_is_wrong_with_it(tmp_path, tiny_oracle, capsys):
    compare(tmp_path, tiny_oracle)
    printed = capsys.readouterr().out
    for text in ("teacher, sampled @ 1", "teacher, sampled @ 4", "student, greedy @ 1", "resampling floor"):
        assert text in printed
    prompts = tiny_oracle.decode_prompts({k: v[:2] for k, v in tiny_oracle.rows["test"].columns.items()})
    assert all(prompt in printed for prompt in prompts)
    assert "word 1" in printed
    assert "trial on oracle-tiny, seed 5" in printed


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
    assert "| student, greedy @ 1 |" in samples.tensor_proto.string_val[0].decode()
    session = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert {"seed", "module.lr", "module.stages.flow.share"} == set(session.hparams)
    student = next(row for row in report.record["rows"] if row["method"] == "student")
    (valid,) = events.Scalars("result/validity")
    assert valid.value == pytest.approx(student["quality"]["validity"])


# -- record files ----------------------------------------------------------------------------------------------------


def quality(**known: float) -> dict:
    return {"validity": None, "exact_match": None, **known}


def row(method: str, decoder: str, forwards: int, figures: dict, **other) -> dict:
    cost = {"tokens_per_s": 1234.5, "flops_per_token": 3.4e6, "peak_memory_bytes": None, "batch": 8}
    extra = {"entropy": None, "distinct": 0.5, "n_samples": 64, "ci95": {}} | other
    return {
        "method": method,
        "decoder": decoder,
        "forwards": forwards,
        "quality": figures,
        "cost": cost if forwards else dict.fromkeys(COST_KEYS),
        **extra,
    }


def make_record(rows: list[dict], correlation: float | None = None) -> dict:
    facts = {"name": "corpus", "entropy_nats_per_token": None, "conditional_total_correlation": correlation}
    head = {"experiment": "trial", "commit": "abc", "seed": 3, "device": "cpu", "versions": {}, "config": {}}
    return head | {"data": facts, "rows": rows}


@pytest.fixture
def oracle_record() -> dict:
    """Every quality that the oracle corpus knows."""

    def figures(share: float) -> dict:
        kinds = {f"validity_{kind}": share / n for n, kind in enumerate(("all", "part", "none"), start=1)}
        truth = {"exact_nll": 3.21, "exact_nll_truth": 3.9, "entropy_truth": 5.67, "coverage": 0.31, "tv": 0.42}
        return quality(validity=share, exact_match=share / 2, **kinds, **truth)

    return make_record(
        [
            row("teacher", "teacher, sampled", 1, figures(0.1), entropy=5.1),
            row("teacher", "teacher, sampled", 16, figures(0.9), entropy=5.2, ci95={"validity": [0.8, 0.95]}),
            row("student", "student, greedy", 1, figures(0.75), entropy=0.0, distinct=0.25),
            row("control", "product of marginals", 0, figures(0.125), entropy=6.0),
            row("control", "resampling floor", 0, figures(1.0), entropy=5.6),
        ],
        correlation=2.34567,
    )


@pytest.fixture
def pairs_record() -> dict:
    """A corpus of files: nothing is known of validity, entropy or the truth."""
    return make_record(
        [
            row("teacher", "teacher, greedy", 1, quality(exact_match=0.25, bleu=12.5, slot_accuracy=0.5)),
            row("teacher", "teacher, greedy", 8, quality(exact_match=0.5, bleu=25.0, slot_accuracy=None)),
            row("student", "student, greedy", 1, quality(exact_match=0.375, bleu=20.0, slot_accuracy=0.625)),
        ]
    )


def test_writing_is_one_step(tmp_path, oracle_record, monkeypatch):
    """A crash before the last step, or in the middle of the text, leaves the old record as it was."""
    path = tmp_path / "deep" / "record.json"
    write_record(oracle_record, path)
    changed = oracle_record | {"seed": 4}

    def crash(*_, **__):
        raise OSError("no space left")

    def half(self, text, **__):
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        crash()

    for target, name, broken in ((record_file.os, "replace", crash), (Path, "write_text", half)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, broken)
            with pytest.raises(OSError, match="no space left"):
                write_record(changed, path)
        assert read_record(path) == oracle_record
    write_record(changed, path)
    assert read_record(path)["seed"] == 4
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_a_figure_that_is_not_a_number_is_never_written(tmp_path, oracle_record):
    path = write_record(oracle_record, tmp_path / "record.json")
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_record(oracle_record | {"seed": value}, path)
        assert read_record(path) == oracle_record


@pytest.mark.parametrize(
    "content",
    [b"", b"{half", b"<html>", b"\xff\xfe\x00\x01", b"3", b"null", b'"text"', b"[]", b"{}"],
)
def test_a_file_that_is_no_record_is_refused_by_sentence(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"record\.json .*; remove it or run the experiment again"):
        read_record(path)


@pytest.mark.parametrize("key", KEYS)
def test_a_record_without_one_of_its_keys_is_refused_by_name(tmp_path, oracle_record, key):
    del oracle_record[key]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(oracle_record))
    with pytest.raises(UsageError, match=rf"record\.json lacks {key}; remove it"):
        read_record(path)
    with pytest.raises(UsageError, match=r"nowhere\.json is not a readable record"):
        read_record(tmp_path / "nowhere.json")


def test_records_are_found_at_any_depth_oldest_first(tmp_path, oracle_record):
    for age, (place, seed) in enumerate({"b/run": 1, "a/sweep/0": 2, "c": 3}.items()):
        path = write_record(oracle_record | {"seed": seed}, tmp_path / place / "record.json")
        os.utime(path, (1e9 + age, 1e9 + age))
    found = find_records(tmp_path)
    assert [record["seed"] for _, record in found] == [1, 2, 3]
    assert found[1][0] == tmp_path / "a" / "sweep" / "0" / "record.json"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no record\.json below .*empty; run an experiment first"):
        find_records(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"the folder .*nowhere does not exist; type paths\.output_dir="):
        find_records(tmp_path / "nowhere")


# -- table and words -------------------------------------------------------------------------------------------------


def cells(table) -> dict[str, list[str]]:
    return {str(column.header): list(column.cells) for column in table.columns}


def heading(title: str) -> str:
    return title.replace("|", " ")


def test_columns_exist_only_where_the_record_has_values(oracle_record, pairs_record):
    assert list(cells(results_table(pairs_record, 300))) == [
        *("decoder", "forwards", "exact match", "slot acc.", "BLEU", "distinct", "tokens/s", "MFLOP/token")
    ]
    everything = cells(results_table(oracle_record, 300))
    assert set(everything) == {"decoder", "forwards"} | {
        heading(t) for t in COLUMNS if t not in ("BLEU", "self-BLEU", "slot acc.")
    }
    assert everything["TV"] == ["0.42"] * 5
    for known in oracle_record["rows"]:
        known["quality"]["tv"] = None
    assert "TV" not in cells(results_table(oracle_record, 300))
    oracle_record["rows"][2]["quality"]["tv"] = 0.25
    assert cells(results_table(oracle_record, 300))["TV"] == ["-", "-", "0.25", "-", "-"]


def test_numbers_are_written_as_their_column_says(oracle_record):
    table = cells(results_table(oracle_record, 300))
    assert table["decoder"][:3] == ["teacher, sampled", "teacher, sampled", "student, greedy"]
    assert table["forwards"] == ["1", "16", "1", "-", "-"]
    assert table["valid"] == ["0.100", "0.900", "0.750", "0.125", "1.000"]
    assert table["valid part"] == ["0.050", "0.450", "0.375", "0.062", "0.500"]
    assert table["exact match"][2] == "0.375"
    assert table["NLL of valid"][2] == "3.21"
    assert table["entropy"] == ["5.10", "5.20", "0.00", "6.00", "5.60"]  # a zero is a value
    assert table["distinct"][2] == "0.25"
    assert table["tokens/s"] == ["1,234", "1,234", "1,234", "-", "-"]
    assert table["MFLOP/token"] == ["3.40", "3.40", "3.40", "-", "-"]


def test_a_narrow_terminal_drops_dispensable_columns_in_their_order_and_cuts_no_number(oracle_record):
    everything = cells(results_table(oracle_record, 300))
    dispensable = [heading(title) for title in DISPENSABLE]
    dropped_before: set[str] = set()
    for width in range(160, 79, -1):
        table = results_table(oracle_record, width)
        left = cells(table)
        dropped = set(everything) - set(left)
        assert dropped == set(dispensable[: len(dropped)])
        assert dropped >= dropped_before
        dropped_before = dropped
        out = io.StringIO()
        Console(width=width, file=out).print(table)
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        body = lines[next(n for n, line in enumerate(lines) if "───" in line) :]
        assert not any("…" in line for line in body), width
        for name, column in left.items():
            assert column == everything[name]
    assert dropped_before == set(dispensable)
    assert set(everything) - dropped_before >= {"decoder", "forwards", "valid", "exact match", "entropy", "tokens/s"}


def test_markdown_has_the_same_numbers(oracle_record, pairs_record):
    for record in (oracle_record, pairs_record):
        header, rule, *lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in markdown_table(record).splitlines()
        ]
        assert all(set(cell) <= {"-", ":"} for cell in rule)
        assert len(rule) == len(header)
        by_name = {name: [line[k] for line in lines] for k, name in enumerate(header)}
        assert by_name == cells(results_table(record, 300))


def test_words_give_the_factorisation_bound_with_the_records_own_total_correlation(oracle_record, pairs_record):
    (bound,) = [s for s in in_words(oracle_record) if "total correlation" in s]
    assert "2.35 nats (total correlation)" in bound
    assert "KL 2.35, which the product of marginals reaches" in bound
    oracle_record["data"]["conditional_total_correlation"] = 0.5
    (bound,) = [s for s in in_words(oracle_record) if "total correlation" in s]
    assert "KL 0.50" in bound
    assert not [s for s in in_words(pairs_record) if "correlation" in s or "marginals" in s]


def test_words_about_the_student_use_the_rows_own_numbers(oracle_record):
    (student,) = [s for s in in_words(oracle_record) if "with the whole plan prompted" in s]
    assert student.startswith("student, greedy, 1 forward: 75")
    assert "37.5 % with part of it (product of marginals 6.2 %)" in student
    assert "without a prompt it says one text" in student  # its unprompted texts have entropy 0
    for row in oracle_record["rows"]:
        row["entropy"] = 1.0
    (student,) = [s for s in in_words(oracle_record) if "with the whole plan prompted" in s]
    assert "0.25 of its unprompted texts are distinct" in student
    (truth,) = [s for s in in_words(oracle_record) if s.startswith("Truth")]
    assert "entropy 5.67 nats" in truth


def test_words_do_without_unprompted_texts(oracle_record):
    """Where every prompt shows something, nothing is known of entropy, coverage or distinct texts."""
    for known in oracle_record["rows"]:
        known |= {"entropy": None, "distinct": None}
        known["quality"] |= {"validity_none": None, "entropy_truth": None, "coverage": None, "tv": None}
    sentences = in_words(oracle_record)
    assert [s for s in sentences if "37.5 % with part of it" in s]
    assert not [s for s in sentences if "None" in s]


# -- figure ----------------------------------------------------------------------------------------------------------


def panels(figure) -> dict:
    return {axis.get_title(): axis for axis in figure.axes}


def points(axis, label: str) -> list[tuple[float, float]]:
    (drawn,) = [c for c in axis.containers if c.get_label() == label]
    return [(float(x), float(y)) for x, y in drawn.lines[0].get_xydata()]


def test_the_judges_figures_are_said_beside_entropy(pairs_record):
    assert not [s for s in in_words(pairs_record) if s.startswith("Judge")]
    for k, row in enumerate(pairs_record["rows"]):
        row["quality"] |= {"judge_perplexity": 20.0 + k, "text_entropy": 3.5}
    (sentence,) = [s for s in in_words(pairs_record) if s.startswith("Judge")]
    one = [row["decoder"] for row in pairs_record["rows"] if row["forwards"] == 1]
    assert all(f"{decoder}, 1 forward: 2" in sentence for decoder in one)
    assert sentence.count("at 3.50") == len(one)
    assert "judge perplexity" in cells(results_table(pairs_record, 300))


def test_figure_has_a_panel_for_each_quality_of_the_oracle(oracle_record):
    found = panels(quality_figure(oracle_record))
    assert set(found) == {
        "validity",
        "exact match",
        "validity, part of the plan prompted",
        "validity, nothing prompted",
    }
    assert points(found["validity"], "teacher, sampled") == [(1, 0.1), (16, 0.9)]
    assert points(found["exact match"], "student, greedy") == [(1, 0.375)]
    levels = {line.get_label(): line.get_ydata()[0] for line in found["validity"].lines if len(line.get_xdata()) == 2}
    assert levels["product of marginals"] == 0.125
    assert levels["resampling floor"] == 1.0


def test_figure_has_a_panel_for_each_quality_of_a_corpus_of_files(pairs_record):
    """Validity is null everywhere and gets none; exact match, BLEU and slot accuracy are all known."""
    found = panels(quality_figure(pairs_record))
    assert "validity" not in found
    assert points(found["exact match"], "teacher, greedy") == [(1, 0.25), (8, 0.5)]
    assert points(found["slot accuracy"], "teacher, greedy") == [(1, 0.5)]  # the other one is null
    assert set(found) == {"exact match", "slot accuracy", "bleu"}
    assert points(found["bleu"], "student, greedy") == [(1, 20.0)]


def test_figure_of_a_record_that_knows_nothing_still_saves(tmp_path):
    nothing = make_record([row("teacher", "teacher", 4, quality()), row("control", "floor", 0, {})])
    quality_figure(nothing).savefig(tmp_path / "nothing.png")
    quality_figure(make_record([])).savefig(tmp_path / "empty.png")
    assert (tmp_path / "nothing.png").stat().st_size > 1000
