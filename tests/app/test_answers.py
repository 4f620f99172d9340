"""Responses that are kept as rows: none is lost or doubled by an interruption, and another command begins anew."""

import json
from types import SimpleNamespace

import pytest
import torch

from app import generate
from app.answers import AnswersFile
from datamodules.files import read_pairs
from models.functional.errors import UsageError

FIELDS = ("slots", "text")
PROMPTS = [{"name": f"Café {k}", "area": "any"} for k in range(10)]


def write(path, made_with=0, until=10, together=4, prompts=PROMPTS):
    """Write responses in groups as `mode=generate` does, up to one that is interrupted; how many were there before."""
    kept = AnswersFile(path, FIELDS, prompts, made_with, together)
    with pytest.raises(UsageError, match="is being written by another process"):
        AnswersFile(path, FIELDS, prompts, made_with, together)
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
    with pytest.raises(UsageError, match=f"type answers_file={tmp_path}/a.jsonl"):
        write(tmp_path / "a.jsonl.gz")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists and is not replaced"):
        write(tmp_path / "link.jsonl")
    with pytest.raises(UsageError, match="cannot be written"):
        write(path / "below.jsonl")
    assert [json.loads(line)["text"] for line in path.open()] == [f"response {k}" for k in range(10)]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    kept = AnswersFile(tmp_path / "a.jsonl", FIELDS, PROMPTS[:1], 0, 4)
    kept.add(["one"])
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not replaced"):
        kept.close()
    assert (tmp_path / "a.jsonl").read_text() == "mine"


@pytest.fixture
def asked(configure, tmp_path, monkeypatch):
    """A function that runs mode=generate with a decoder that draws a number for each prompt, and may be interrupted."""
    (tmp_path / "prompts.txt").write_text("".join(f"who=anna {k}\n" for k in range(7)))

    class Drawn:
        refines = True

        def __init__(self, batches):
            self.left = batches

        def __call__(self, rows, generator):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return torch.randint(10**6, (len(rows["input_ids"]),), generator=generator)

    data = SimpleNamespace(
        encode_prompts=lambda prompts: {"input_ids": torch.zeros(len(prompts), 1)},
        decode_responses=lambda ids: [str(int(number)) for number in ids],
    )
    monkeypatch.setattr(generate, "BATCH", 3)
    monkeypatch.setattr(generate, "find_weights", lambda cfg: None)
    monkeypatch.setattr(generate, "settle_models", lambda cfg, weights: None)
    monkeypatch.setattr(generate, "data_of", lambda cfg, weights: data)

    def ask(name, *options, batches=-1):
        monkeypatch.setattr(generate, "find_decoder", lambda *parts: Drawn(batches))
        given = ["mode=generate", f"prompt_file={tmp_path}/prompts.txt", f"answers_file={tmp_path}/{name}", *options]
        generate.generate(configure("experiment=meanflow_llada", *given))
        return (tmp_path / name).read_text()

    return ask


def test_an_interrupted_command_ends_like_an_uninterrupted_one(asked, capsys):
    whole = asked("whole.jsonl")
    assert len({json.loads(line)["response"] for line in whole.splitlines()}) == 7
    with pytest.raises(KeyboardInterrupt):
        asked("answers.jsonl", batches=1)
    assert "3 of 7 responses are kept; to go on type the same command" in capsys.readouterr().out
    assert asked("answers.jsonl", batches=2) == whole  # only what was missing
    assert "going on after 3 of 7 responses" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["seed=1", "teacher.path=other", "forwards=2", "module.few_step=renoise"])
def test_another_model_or_option_begins_anew(asked, capsys, other):
    with pytest.raises(KeyboardInterrupt):
        asked("answers.jsonl", batches=1)
    assert asked("answers.jsonl", other) == asked("fresh.jsonl", other)
    assert "going on" not in capsys.readouterr().out


def test_seeds_of_batches_differ_within_a_run_and_between_runs():
    assert generate.batch_seed(5, 0) == 5
    seeds = [generate.batch_seed(seed, start) for seed in range(4) for start in (0, 1, 2, 64, 128)]
    assert len(set(seeds)) == len(seeds)


def test_one_process_of_several_answers(asked, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(FileNotFoundError):
        asked("answers.jsonl")
    assert not list(tmp_path.glob("answers*"))
