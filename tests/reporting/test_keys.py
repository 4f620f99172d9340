"""Files of earlier versions are read under the names of today; those of a later one are refused."""

import json

import pytest

from models.functional.errors import UsageError
from reporting.gather import frontier_markdown, frontier_rows
from reporting.keys import FORMAT, current_name, current_names
from reporting.record import find_records, read_record


def old_record() -> dict:
    """As runs wrote it before records had a format."""
    quality = {"validity": 0.5, "bleu_forced": 70.0, "bleu_free": 60.0, "rebuilt_dropped_10": 0.9, "nll_given_own": 1.5}
    row = {
        "method": "student", "decoder": "student", "forwards": 2, "quality": quality, "entropy": None, "distinct": None,
        "cost": {"tokens_per_s": 10.0, "acceptance": None}, "n_samples": 4, "ci95": {"validity": [0.4, 0.6]},
    }  # fmt: skip
    head = {"experiment": "old", "commit": None, "seed": 0, "device": "cpu", "versions": {}, "config": {}}
    return {**head, "data": {"name": "corpus"}, "rows": [row]}


def test_an_old_record_is_read_under_the_names_of_today(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(old_record()))
    record = read_record(tmp_path / "record.json")
    assert record["format"] == FORMAT
    (row,) = record["rows"]
    assert row["nfe"] == 2
    assert "forwards" not in row
    assert row["quality"] == {
        "validity": 0.5,
        "bleu_teacher_forced": 70.0,
        "bleu_free_running": 60.0,
        "reconstruction_dropped_10": 0.9,
        "nll_own_condition": 1.5,
    }
    assert row["cost"]["tokens_per_s"] == 10.0
    assert row["ci95"] == {"validity": [0.4, 0.6]}
    ((_, found),) = find_records(tmp_path)
    assert "| old | student | 2 | 1 | 0.500 | 10 |" in frontier_markdown(frontier_rows([found]))


def test_what_is_written_today_is_read_as_it_is(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(old_record()))
    record = read_record(tmp_path / "record.json")
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert read_record(tmp_path / "record.json") == record


def test_a_newer_format_is_refused_by_sentence(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(old_record() | {"format": FORMAT + 1}))
    with pytest.raises(UsageError, match=rf"record\.json has format {FORMAT + 1}, .* up to {FORMAT}; update Leap"):
        read_record(tmp_path / "record.json")


def test_names_of_logs_keep_their_group():
    assert current_name("monitor/nll_given_own") == "monitor/nll_own_condition"
    assert current_name("result/nll_listed_best") == "result/nll_enumerated_best"
    assert current_names({"bleu": 1, "val/loss": 2, "bleu_freedom": 3}) == {"bleu": 1, "val/loss": 2, "bleu_freedom": 3}
