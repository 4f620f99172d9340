import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from datamodules.files import read_pairs
from models.functional.errors import UsageError

ROWS = [{"q": "jump, twice", "a": "J J"}, {"q": 'say "hé"\nnow', "a": "3"}, {"q": "", "a": "W"}]


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def write_as(kind, folder):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, ROWS)
    if kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["q", "a"])
            writer.writeheader()
            writer.writerows(ROWS)
        return path
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return path
    plain = write_as(kind.removesuffix(".gz"), folder)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "jsonl.gz", "csv.gz"])
def test_all_formats_give_the_same_rows(kind, tmp_path):
    pairs = read_pairs(write_as(kind, tmp_path), "q", "a")
    assert pairs.prompts == [row["q"] for row in ROWS]
    assert pairs.responses == [row["a"] for row in ROWS]
    assert pairs.slots == [None] * 3
    assert pairs.problems == []


def test_bad_lines_are_named_by_number_and_the_others_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        b'\xef\xbb\xbf{"q": "one", "a": 1}',
        b"{broken",
        b'["a list"]',
        b'{"q": "\xff", "a": "x"}',
        b"",
        b'{"q": "no answer"}',
        b'{"q": null, "a": "x"}',
        b'{"q": "\\ud800", "a": "x"}',
        b'{"q": "a", "a": ["x"]}',
        b'{"q": "two", "a": true}\r',
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match=r"(?s)7 unusable lines.*rows\.jsonl:2: not JSON.*and 2 more"):
        pairs = read_pairs(path, "q", "a")
    assert (pairs.prompts, pairs.responses) == (["one", "two"], ["1", "True"])
    assert [int(problem.split(":")[1]) for problem in pairs.problems] == [2, 3, 4, 6, 7, 8, 9]
    reasons = ["not JSON (", "not a JSON object", "bad UTF-8", "no field 'a'", "no value", "not valid UTF-8", "list"]
    for problem, reason in zip(pairs.problems, reasons, strict=True):
        assert reason in problem


def test_bad_csv_lines_are_named_by_the_line_they_begin_on(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'q,a\n\n"one\nline",1\ntwo\nthree,3,3\n\xff,4\n"x"y,5\nfive,5\n')
    with pytest.warns(UserWarning, match="4 unusable lines"):
        pairs = read_pairs(path, "q", "a")
    assert pairs.prompts == ["one\nline", "five"]
    assert [int(problem.split(":")[1]) for problem in pairs.problems] == [5, 6, 7, 8]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_dictionary_prompts_become_text_and_keep_their_slots(kind, tmp_path):
    rows = [{"q": {"name": "The Vaults", "price": 30, "area": "city"}, "a": "x"}, {"q": {"name": "Aromi"}, "a": "y"}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    pairs = read_pairs(path, "q", "a")
    assert pairs.prompts == ["name[The Vaults], price[30], area[city]", "name[Aromi]"]
    assert pairs.slots == [{"name": "The Vaults", "price": "30", "area": "city"}, {"name": "Aromi"}]


def test_globs_and_lists_are_read_in_order(tmp_path, monkeypatch):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"part-{name}.jsonl", [{"q": name, "a": name}])
    monkeypatch.chdir(tmp_path)
    assert read_pairs("part-*.jsonl", "q", "a").prompts == ["a", "b", "c"]
    assert read_pairs(["part-c.jsonl", "part-[ab].jsonl"], "q", "a").prompts == ["c", "a", "b"]


def test_what_cannot_be_read_at_all_is_named(tmp_path):
    def refuses(path, message, fields=("q", "a")):
        with pytest.raises(UsageError, match=message):
            read_pairs(path, *fields, option="data.val")

    good = write_jsonl(tmp_path / "good.jsonl", [{"q": "x", "a": "y", "z": 1}])
    refuses(tmp_path / "none.jsonl", r"data\.val=.*none\.jsonl does not exist")
    refuses(tmp_path / "no*.jsonl", "does not exist")
    refuses(tmp_path, r"is a folder; type data\.val='.*/\*\.jsonl'")
    refuses([], "names no file")
    refuses(good, r"has no field 'input'; type data\.prompt_field=NAME .*: q, a, z", ("input", "a"))
    refuses(good, r"has no field 'out'; type data\.response_field=NAME .*: q, a, z", ("q", "out"))

    (tmp_path / "empty.jsonl").write_text("\n")
    refuses(tmp_path / "empty.jsonl", "is empty")
    (tmp_path / "header.csv").write_text("q,a\n")
    refuses(tmp_path / "header.csv", "is empty")
    (tmp_path / "rows.txt").write_text("x")
    refuses(tmp_path / "rows.txt", "unknown extension")
    (tmp_path / "bad.jsonl").write_text("x\ny\n")
    refuses(tmp_path / "bad.jsonl", r"(?s)no usable line among 2.*bad\.jsonl:1: not JSON.*bad\.jsonl:2")
    (tmp_path / "bad.parquet").write_text("x")
    refuses(tmp_path / "bad.parquet", "cannot be read")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"q": "x", "a": "y"}\n' * 99)[:-10])
    refuses(tmp_path / "cut.jsonl.gz", "cannot be read")


def test_a_hub_name_is_loaded_with_its_split(monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{**row, "extra": 1} for row in ROWS])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_pairs("hub:some/name:test[:10]", "q", "a").prompts == [row["q"] for row in ROWS]
    assert len(read_pairs(["hub:other"], "q", "a")) == 3
    assert asked == [("some/name", "test[:10]"), ("other", "train")]
    with pytest.raises(UsageError, match="its fields: q, a, extra"):
        read_pairs("hub:other", "q", "b")


def test_without_network_a_hub_name_says_what_to_do(monkeypatch):
    def load(name, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UsageError, match=r"(?s)data\.train=hub:some/name could not be loaded.*no route.*download"):
        read_pairs("hub:some/name", "q", "a")
