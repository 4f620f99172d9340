"""Responses that are kept as rows: none is lost or doubled by an interruption, and another command begins anew."""

import json

import pytest

from app.answers import AnswersFile
from datamodules.files import read_pairs
from models.functional.errors import UsageError

FIELDS = ("slots", "text")
PROMPTS = [{"name": f"Café {k}", "area": "any"} for k in range(10)]


def write(path, made_with=0, until=10, together=4, prompts=PROMPTS):
    """Write responses in groups as `mode=generate` does, up to one that is interrupted; how many were there before."""
    kept = AnswersFile(path, FIELDS, prompts, made_with, together)
    before = kept.done
    for start in range(before, until, together):
        kept.add([f"response {k}" for k in range(start, min(start + together, len(prompts)))])
    kept.close()
    return before


def test_rows_are_read_as_training_data(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    write(path)
    pairs = read_pairs(path, *FIELDS)
    assert pairs.slots == PROMPTS
    assert pairs.responses == [f"response {k}" for k in range(10)]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("until", [0, 4, 8])
@pytest.mark.parametrize("cut", [0, 3])
def test_an_interrupted_file_equals_an_uninterrupted_one(tmp_path, until, cut):
    write(tmp_path / "whole.jsonl")
    path = tmp_path / "answers.jsonl"
    write(path, until=until)
    assert not path.exists()
    (partial,) = tmp_path.glob("answers.jsonl.*.partial")
    with partial.open("ab") as file:  # stopped while a group was written
        file.write(b'{"slots": "half'[: cut * 5])
    assert write(path) == until
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("other", [{"made_with": 1}, {"prompts": PROMPTS[:9]}])
def test_another_command_does_not_go_on_where_this_one_stopped(tmp_path, other):
    path = tmp_path / "answers.jsonl"
    write(path, until=4)
    assert write(path, until=0, **other) == 0
    assert write(path) == 4


def test_a_file_that_exists_is_not_replaced(tmp_path):
    path = tmp_path / "answers.jsonl"
    write(path)
    with pytest.raises(UsageError, match="exists and is not replaced; type another name"):
        write(path)
    with pytest.raises(UsageError, match=r"type answers_file=answers.jsonl"):
        write(tmp_path / "answers.csv")
    with pytest.raises(UsageError, match="cannot be written"):
        write(path / "below.jsonl")
    assert [json.loads(line)["text"] for line in path.open()] == [f"response {k}" for k in range(10)]
