"""None"""

import inspect
import json
from pathlib import Path

import pytest
import torch
from helpers.pairs import ROWS
from omegaconf import OmegaConf

from datamodules.pairs import PairsDataModule
from models.functional.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:data.test is not set")


def split_prompts(datamodule, split):
    return datamodule.decode_prompts(datamodule.rows[split][:])


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "words"])
def test_rows_decode_to_the_pairs_in_the_file(build_pairs, tokenizer):
    datamodule = build_pairs(val=ROWS[:3], test=ROWS[3:5], tokenizer=tokenizer)
    rows = datamodule.rows["train"][:]
    assert datamodule.decode_prompts(rows) == [row["q"] for row in ROWS]
    assert datamodule.decode_responses(rows["input_ids"][:, -datamodule.response_length :]) == [r["a"] for r in ROWS]
    assert rows["input_ids"].shape == (25, datamodule.prompt_length + datamodule.response_length)
    assert split_prompts(datamodule, "test") == [row["q"] for row in ROWS[3:5]]
    assert datamodule.prompt_length % 8 == datamodule.response_length % 8 == 0


def test_row_ids_are_unique_over_the_splits(build_pairs):
    datamodule = build_pairs(val=ROWS[:3], test=ROWS[3:5])
    ids = torch.cat([datamodule.rows[split].columns["row_index"] for split in ("train", "val", "test")])
    assert len(ids.unique()) == len(ids) == 30


def test_setup_again_changes_nothing_and_reads_nothing(build_pairs, monkeypatch):
    datamodule = build_pairs()
    rows = dict(datamodule.rows)
    monkeypatch.setattr("datamodules.pairs.read_pairs", pytest.fail)
    datamodule.setup("test")
    assert datamodule.rows == rows


def test_no_prompt_lies_in_both_train_and_held_out_val(build_pairs):
    repeated = ROWS + [{"q": row["q"], "a": "J"} for row in ROWS]
    datamodule = build_pairs(train=repeated, val_fraction=0.2, seed=3)
    train, val = (split_prompts(datamodule, split) for split in ("train", "val"))
    assert set(train).isdisjoint(val)
    assert (len(train), len(val)) == (40, 10)
    assert split_prompts(build_pairs(train=repeated, val_fraction=0.2, seed=3), "val") == val
    assert split_prompts(build_pairs(train=repeated, val_fraction=0.2, seed=4), "val") != val
    with pytest.raises(UsageError, match=r"same prompt.*data\.val"):
        build_pairs(train=ROWS[:1] * 3)


def test_without_test_rows_the_val_split_takes_their_place_with_a_warning(build_pairs):
    with pytest.warns(UserWarning, match=r"data\.test is not set"):
        datamodule = build_pairs(val=ROWS[:6])
    assert split_prompts(datamodule, "test") == split_prompts(datamodule, "val")


def test_max_test_rows_is_a_subset_fixed_by_the_seed(build_pairs):
    first, again, other = (build_pairs(val=ROWS, test=ROWS, max_test_rows=7, seed=seed) for seed in (1, 1, 2))
    assert len(first.rows["test"]) == 7
    assert set(split_prompts(first, "test")) < {row["q"] for row in ROWS}
    assert split_prompts(first, "test") == split_prompts(again, "test") != split_prompts(other, "test")
    assert len(first.rows["val"]) == 25


def test_every_test_prompt_is_answered_as_often_as_asked(build_pairs):
    repeated = [*ROWS, *ROWS[::2]]
    data = build_pairs(val=ROWS, test=repeated, max_test_rows=12, test_answers=4)
    prompts = split_prompts(data, "test")
    assert sorted(prompts.count(prompt) for prompt in set(prompts)) == [4, 4, 4]
    everything = build_pairs(val=ROWS, test=repeated, test_answers=2)
    assert split_prompts(everything, "test") == [row["q"] for row in ROWS for _ in range(2)]
    with pytest.raises(UsageError, match=r"data\.test_answers=8 must be at least 1 and at most data\.max_test_rows=4"):
        build_pairs(max_test_rows=4, test_answers=8)


def test_a_row_that_does_not_fit_raises_or_is_dropped(build_pairs, capsys):
    long = [{"q": "jump", "a": "J"}, {"q": "walk", "a": "W" * 99}]
    with pytest.raises(UsageError, match=r"1 rows of the test split.*row 1 has 5 prompt tokens and 99 response tokens"):
        build_pairs(val=ROWS, test=long)
    with pytest.raises(UsageError, match=r"type data\.response_length=99, or data\.too_long=drop"):
        build_pairs(val=ROWS, test=long)
    with pytest.warns(
        UserWarning, match=r"leaves out \d+% of the test split.*type data\.response_length=99 to keep them"
    ):
        datamodule = build_pairs(val=ROWS, test=long, too_long="drop")
    assert split_prompts(datamodule, "test") == ["jump"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in printed if line.split()[:1] == ["test"]] == [["1", "0"]]
    with pytest.raises(UsageError, match="leaves no row of the test split"):
        build_pairs(val=ROWS, test=long[1:], too_long="drop")
    assert len(build_pairs(val=ROWS, test=long, response_length=99).rows["test"]) == 2


def test_bad_lines_are_counted_in_the_table(build_pairs, tmp_path, capsys):
    path = tmp_path / "broken.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{broken\n")
    with pytest.warns(UserWarning, match=r"broken\.jsonl:26: not JSON"):
        build_pairs(train=str(path), test=ROWS)
    printed = capsys.readouterr().out.splitlines()
    assert next(line.split()[-1] for line in printed if line.split()[:1] == ["train"]) == "1"


def test_options_that_cannot_work_are_named(build_pairs):
    with pytest.raises(UsageError, match=r"data\.train=nowhere\.jsonl does not exist"):
        build_pairs(train="nowhere.jsonl")
    with pytest.raises(UsageError, match=r"data\.too_long=cut"):
        build_pairs(too_long="cut")
    with pytest.raises(UsageError, match=r"data\.val_fraction=1\.5"):
        build_pairs(val_fraction=1.5)
    with pytest.raises(UsageError, match=r"data\.max_test_rows=0"):
        build_pairs(max_test_rows=0)
    with pytest.raises(UsageError, match=r"type data\.batch_size=20 or less"):
        build_pairs(val_fraction=0.2, batch_size=99).train_dataloader()


def test_fingerprint_follows_rows_and_vocabulary(build_pairs):
    same = {"val": ROWS[:2], "test": ROWS[:2]}
    first = build_pairs(**same).fingerprint()
    assert build_pairs(**{**same, "test": ROWS[:9]}, setup=False).fingerprint() == first
    assert build_pairs(train=ROWS[:-1], **same).fingerprint() != first
    assert build_pairs(train=[*ROWS[:-1], {**ROWS[-1], "a": "W"}], **same).fingerprint() != first
    assert build_pairs(tokenizer="words", **same).fingerprint() != first


def test_the_config_has_exactly_the_options_of_the_constructor(tmp_path):
    config = OmegaConf.load(Path(__file__).parents[2] / "conf" / "data" / "pairs.yaml")
    options = set(config) - {"_target_"}
    assert options == set(inspect.signature(PairsDataModule).parameters)
    for name in ("train", "prompt_field", "response_field"):
        assert OmegaConf.is_missing(config, name)


def test_prompts_end_in_a_mark_that_is_not_shown(build_pairs):
    marked, plain = build_pairs(), build_pairs(mark_prompt_end=False)
    for data, ends in ((marked, True), (plain, False)):
        rows = data.rows["train"].columns
        last = rows["input_ids"][:, data.prompt_length - 1]
        assert (last == data.tokenizer.eos_token_id).all() == ends
        asked = data.encode_prompts(["jump"])
        assert bool(asked["input_ids"][0, data.prompt_length - 1] == data.tokenizer.eos_token_id) == ends
        assert data.decode_prompts(asked) == ["jump"]


def test_slots_of_dictionary_prompts_are_known_attributes_of_their_texts(build_pairs):
    train = [
        {"q": {"name": n, "food": f}, "a": f"{n} {f}"} for n in ("Aromi", "Blue", "Cocum") for f in ("Thai", "Pub")
    ]
    test = [{"q": {"name": "Blue"}, "a": "Blue"}, {"q": {"food": "Thai", "name": "Aromi"}, "a": "Aromi"}]
    data = build_pairs(train=train, test=test)
    assert data.attribute_names == ["food", "name"]
    plans = {split: data.attributes_of(data.rows[split].columns) for split in ("train", "test")}
    train_names = dict(zip(split_prompts(data, "train"), plans["train"].tolist(), strict=True))
    (blue, aromi) = plans["test"].tolist()
    assert blue[0] == 0  # no food is given
    seen = {prompt: plan for prompt, plan in train_names.items() if "Blue" in prompt}
    assert all(plan[1] == blue[1] for plan in seen.values())
    assert all(plan[1] == aromi[1] for prompt, plan in train_names.items() if "Aromi" in prompt)
    found = data.signals(data.rows["test"].columns)
    assert {name: found[name].tolist() for name in ("food", "name")} == {
        "food": [0, aromi[0]],
        "name": [blue[1], aromi[1]],
    }
    sizes = data.signal_sizes
    assert (sizes["food"], sizes["name"]) == (3, 4)  # none is a value too
    plain = build_pairs(setup=True)  # prompts that are text
    assert plain.attributes_of({"row_index": torch.tensor([0])}) is None
    assert set(plain.signal_sizes) == set(plain.signals(plain.rows["test"].columns)) == {"text opening", "text length"}
