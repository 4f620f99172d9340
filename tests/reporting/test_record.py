"""record.json: written in one step, read with sentences."""

import json
import os
from pathlib import Path

import pytest

from models.functional.errors import UsageError
from reporting import record as record_file
from reporting.record import KEYS, find_records, read_record, write_record


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
    with pytest.raises(UsageError, match=r"the folder .*nowhere does not exist; type report_dir="):
        find_records(tmp_path / "nowhere")
