"""Rows that are read twice, and rows of a split that are trained on, are told."""

import glob
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.pairs import ROWS

from datamodules.packed_text import PackedTextDataModule
from datamodules.sources import listed
from datamodules.state import among

OPTIONS = {
    "name": "t",
    "tokenizer": "byte",
    "vocab_size": 0,
    "sequence_length": 8,
    "batch_size": 1,
    "eval_batch_size": 1,
}


@pytest.fixture
def told(tmp_path, monkeypatch, build_pairs):
    """The warnings of a corpus of pairs, or of packed text, that reads its splits from these files."""
    monkeypatch.chdir(tmp_path)

    def build(kind: str, **sources) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if kind == "pairs":
                build_pairs(**sources)
            else:
                PackedTextDataModule(**OPTIONS, text_field="q", cache_dir=str(tmp_path), **sources).setup()
        return "\n".join(str(warning.message) for warning in caught)

    for name, rows in (("a", ROWS[:12]), ("b", ROWS[12:18]), ("c", ROWS[18:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build


@pytest.mark.parametrize("kind", ["pairs", "packed"])
def test_a_file_that_a_split_names_twice(told, tmp_path, kind):
    own = {"val": "b.jsonl", "test": "c.jsonl"}
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    for twice in ("./a.jsonl", str(tmp_path / "a.jsonl"), "[a]*.jsonl", "link.jsonl"):
        assert f"data.train names {tmp_path}/a.jsonl 2 times, so its rows count as often" in told(
            kind, train=("a.jsonl", twice), **own
        )
    assert "times" not in told(kind, train="a.jsonl", **own)
    assert "data.val names" in told(kind, train="a.jsonl", val=("b.jsonl",) * 3, test="c.jsonl")


@pytest.mark.parametrize("kind", ["pairs", "packed"])
def test_the_files_of_a_split_are_listed_once(told, monkeypatch, kind):
    patterns = []
    matches = glob.glob
    monkeypatch.setattr(glob, "glob", lambda name, **options: patterns.append(name) or matches(name, **options))
    said = told(kind, train=("[a]*.jsonl", "a.jsonl"), val="[b].jsonl", test="[c].jsonl")
    assert patterns == ["[a]*.jsonl", "[b].jsonl", "[c].jsonl"]
    assert "a.jsonl 2 times" in said


def test_a_list_of_files_is_a_source_that_stays_as_it_is(told, tmp_path):
    (tmp_path / "hub:x.jsonl").write_text("{}")
    once = listed(["*.jsonl", "hub:name:test"], "data.train")
    assert once == [*(Path(f"{name}.jsonl") for name in ("a", "b", "c", "hub:x")), "hub:name:test"]
    (tmp_path / "d.jsonl").write_text("{}")
    assert listed(once, "data.train") == once
    assert len(listed("*.jsonl", "data.train")) == 5


@pytest.mark.parametrize(("kind", "what"), [("pairs", "rows"), ("packed", "documents")])
def test_texts_that_are_trained_on_in_another_split(told, kind, what):
    assert "are in data.train" not in told(kind, train="a.jsonl", val="b.jsonl", test="c.jsonl")
    said = told(kind, train=("a.jsonl", "b.jsonl"), val="c.jsonl", test=("b.jsonl", "c.jsonl"))
    assert (
        f"data.test: 6 of its {len(ROWS) - 12} {what} are in data.train too, so its figures are not of unseen" in said
    )
    assert "data.val" not in said
    said = told(kind, train=("a.jsonl", "b.jsonl"), val="c.jsonl", test=("b.jsonl", "b.jsonl"))
    assert f"data.test: 12 of its 12 {what}" in said
    # one of the documents is held out for validation, and then no training text
    assert f"data.test: 11 of its 12 {what}" in told(kind, train="a.jsonl", test="a.jsonl")


def test_a_hash_beyond_a_signed_number_is_found_among_few():
    largest = np.array([2**64 - 1], np.uint64)
    assert among(np.array([2**64 - 1, 5], np.uint64), largest).tolist() == [True, False]
