import inspect
import json
from pathlib import Path

import pytest
import torch
from helpers_trainer import quiet_trainer
from lightning import LightningModule
from omegaconf import OmegaConf

from datamodules.loader import EpochSampler
from datamodules.pairs import PairsDataModule
from datamodules.pairs_score import self_bleu, slot_share
from models.functional.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:data.test is not set")

COMMANDS = {"jump": "J", "walk twice": "W W", "run left": "L R", "look right": "T L", "jump thrice": "J J J"}
ROWS = [
    {"q": f"{prompt} and {other}", "a": f"{a} {b}"} for prompt, a in COMMANDS.items() for other, b in COMMANDS.items()
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def build(tmp_path):
    """A function that makes a set-up datamodule; rows given as lists are written to files first."""

    def make(setup=True, **options):
        options = {"train": ROWS, **options}
        for split in ("train", "val", "test"):
            if isinstance(options.get(split), list):
                options[split] = write(tmp_path / f"{split}.jsonl", options[split])
        defaults = {
            "name": "pairs",
            "prompt_field": "q",
            "response_field": "a",
            "tokenizer": "byte",
            "vocab_size": 512,
            "batch_size": 4,
            "eval_batch_size": 4,
            "cache_dir": tmp_path / "cache",
        }
        datamodule = PairsDataModule(**{**defaults, **options})
        if setup:
            datamodule.setup("fit")
        return datamodule

    return make


def split_prompts(datamodule, split):
    return datamodule.decode_prompts(datamodule.rows[split][:])


def respond(datamodule, texts):
    """Texts as responses (N, R), padded with end-of-text."""
    responses = torch.full((len(texts), datamodule.response_length), datamodule.tokenizer.eos_token_id)
    for row, text in enumerate(texts):
        ids = datamodule.tokenizer.encode(text, add_special_tokens=False)
        responses[row, : len(ids)] = torch.tensor(ids)
    return responses


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "words"])
def test_rows_decode_to_the_pairs_in_the_file(build, tokenizer):
    datamodule = build(val=ROWS[:3], test=ROWS[3:5], tokenizer=tokenizer)
    rows = datamodule.rows["train"][:]
    assert datamodule.decode_prompts(rows) == [row["q"] for row in ROWS]
    assert datamodule.decode_responses(rows["input_ids"][:, -datamodule.response_length :]) == [r["a"] for r in ROWS]
    assert rows["input_ids"].shape == (25, datamodule.prompt_length + datamodule.response_length)
    assert split_prompts(datamodule, "test") == [row["q"] for row in ROWS[3:5]]
    assert datamodule.prompt_length % 8 == datamodule.response_length % 8 == 0


def test_row_ids_are_unique_over_the_splits(build):
    datamodule = build(val=ROWS[:3], test=ROWS[3:5])
    ids = torch.cat([datamodule.rows[split].columns["row_index"] for split in ("train", "val", "test")])
    assert len(ids.unique()) == len(ids) == 30


def test_setup_again_changes_nothing_and_reads_nothing(build, monkeypatch):
    datamodule = build()
    rows = dict(datamodule.rows)
    monkeypatch.setattr("datamodules.pairs.read_pairs", pytest.fail)
    datamodule.setup("test")
    assert datamodule.rows == rows


def test_no_prompt_lies_in_both_train_and_held_out_val(build):
    repeated = ROWS + [{"q": row["q"], "a": "J"} for row in ROWS]
    datamodule = build(train=repeated, val_fraction=0.2, seed=3)
    train, val = (split_prompts(datamodule, split) for split in ("train", "val"))
    assert set(train).isdisjoint(val)
    assert (len(train), len(val)) == (40, 10)
    assert split_prompts(build(train=repeated, val_fraction=0.2, seed=3), "val") == val
    assert split_prompts(build(train=repeated, val_fraction=0.2, seed=4), "val") != val
    with pytest.raises(UsageError, match=r"same prompt.*data\.val"):
        build(train=ROWS[:1] * 3)


def test_without_test_rows_the_val_split_takes_their_place_with_a_warning(build):
    with pytest.warns(UserWarning, match=r"data\.test is not set"):
        datamodule = build(val=ROWS[:6])
    assert split_prompts(datamodule, "test") == split_prompts(datamodule, "val")


def test_max_test_rows_is_a_subset_fixed_by_the_seed(build):
    first, again, other = (build(val=ROWS, test=ROWS, max_test_rows=7, seed=seed) for seed in (1, 1, 2))
    assert len(first.rows["test"]) == 7
    assert set(split_prompts(first, "test")) < {row["q"] for row in ROWS}
    assert split_prompts(first, "test") == split_prompts(again, "test") != split_prompts(other, "test")
    assert len(first.rows["val"]) == 25


def test_every_test_prompt_is_answered_as_often_as_asked(build):
    repeated = [*ROWS, *ROWS[::2]]
    data = build(val=ROWS, test=repeated, max_test_rows=12, test_answers=4)
    prompts = split_prompts(data, "test")
    assert sorted(prompts.count(prompt) for prompt in set(prompts)) == [4, 4, 4]
    everything = build(val=ROWS, test=repeated, test_answers=2)
    assert split_prompts(everything, "test") == [row["q"] for row in ROWS for _ in range(2)]
    with pytest.raises(UsageError, match=r"data\.test_answers=8 must be at least 1 and at most data\.max_test_rows=4"):
        build(max_test_rows=4, test_answers=8)


def test_a_row_that_does_not_fit_raises_or_is_dropped(build, capsys):
    long = [{"q": "jump", "a": "J"}, {"q": "walk", "a": "W" * 99}]
    with pytest.raises(UsageError, match=r"1 rows of the test split.*row 1 has 5 prompt tokens and 99 response tokens"):
        build(val=ROWS, test=long)
    with pytest.raises(UsageError, match=r"type data\.response_length=99, or data\.too_long=drop"):
        build(val=ROWS, test=long)
    datamodule = build(val=ROWS, test=long, too_long="drop")
    assert split_prompts(datamodule, "test") == ["jump"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in printed if line.split()[:1] == ["test"]] == [["1", "0"]]
    with pytest.raises(UsageError, match="leaves no row of the test split"):
        build(val=ROWS, test=long[1:], too_long="drop")
    assert len(build(val=ROWS, test=long, response_length=99).rows["test"]) == 2


def test_bad_lines_are_counted_in_the_table(build, tmp_path, capsys):
    path = tmp_path / "broken.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{broken\n")
    with pytest.warns(UserWarning, match=r"broken\.jsonl:26: not JSON"):
        build(train=str(path), test=ROWS)
    printed = capsys.readouterr().out.splitlines()
    assert next(line.split()[-1] for line in printed if line.split()[:1] == ["train"]) == "1"


def test_options_that_cannot_work_are_named(build):
    with pytest.raises(UsageError, match=r"data\.train=nowhere\.jsonl does not exist"):
        build(train="nowhere.jsonl")
    with pytest.raises(UsageError, match=r"data\.too_long=cut"):
        build(too_long="cut")
    with pytest.raises(UsageError, match=r"data\.val_fraction=1\.5"):
        build(val_fraction=1.5)
    with pytest.raises(UsageError, match=r"data\.max_test_rows=0"):
        build(max_test_rows=0)
    with pytest.raises(UsageError, match=r"type data\.batch_size=20 or less"):
        build(val_fraction=0.2, batch_size=99).train_dataloader()


def test_fingerprint_follows_rows_and_vocabulary(build):
    same = {"val": ROWS[:2], "test": ROWS[:2]}
    first = build(**same).fingerprint()
    assert build(**{**same, "test": ROWS[:9]}, setup=False).fingerprint() == first
    assert build(train=ROWS[:-1], **same).fingerprint() != first
    assert build(train=[*ROWS[:-1], {**ROWS[-1], "a": "W"}], **same).fingerprint() != first
    assert build(tokenizer="words", **same).fingerprint() != first


def test_the_config_has_exactly_the_options_of_the_constructor(tmp_path):
    config = OmegaConf.load(Path(__file__).parents[2] / "conf" / "data" / "pairs.yaml")
    options = set(config) - {"_target_"}
    assert options == set(inspect.signature(PairsDataModule).parameters)
    for name in ("train", "prompt_field", "response_field"):
        assert OmegaConf.is_missing(config, name)


# -- scorer ----------------------------------------------------------------------------------------------------------


def test_exact_match_takes_any_reference_of_the_same_prompt_in_the_split(build):
    test = [{"q": "jump", "a": "J"}, {"q": "jump", "a": "hop"}, {"q": "walk", "a": "W W"}, {"q": "run", "a": "R"}]
    datamodule = build(val=[{"q": "run", "a": "sprint"}], test=test)
    score = datamodule.scorer(datamodule.rows["test"][:], respond(datamodule, ["hop", "hop", "W", "sprint"]))
    assert score.quality["exact_match"] == 0.5
    assert score.distinct == 0.75
    assert score.quality["validity"] is score.quality["slot_accuracy"] is score.entropy is None
    low, high = score.ci95["exact_match"]
    assert low == pytest.approx(0.150, abs=1e-3)
    assert high == pytest.approx(0.850, abs=1e-3)
    truth = datamodule.rows["test"][:]["input_ids"][:, -datamodule.response_length :]
    assert datamodule.scorer(datamodule.rows["test"][:], truth).quality["exact_match"] == 1.0


def test_what_follows_end_of_text_is_not_judged(build):
    datamodule = build(val=ROWS, test=[{"q": "jump", "a": "J"}])
    responses = respond(datamodule, ["JxW"])
    responses[0, 1] = datamodule.tokenizer.eos_token_id
    assert datamodule.scorer(datamodule.rows["test"][:], responses).quality["exact_match"] == 1.0


def test_words_are_judged_as_the_tokenizer_writes_them(build):
    test = [{"q": "jump", "a": "J  W"}, {"q": "jump and jump", "a": "J unheard"}]
    datamodule = build(val=ROWS, test=test, tokenizer="words")
    rows = datamodule.rows["test"][:]
    score = datamodule.scorer(rows, rows["input_ids"][:, -datamodule.response_length :])
    # The second row cannot be right: the tokenizer does not know its word, and "<unk>" is no answer.
    assert score.quality["exact_match"] == 0.5


def test_bleu_by_hand(build):
    test = [{"q": "x", "a": "a b c d e g"}, {"q": "x", "a": "z"}]
    datamodule = build(val=ROWS, test=test)
    rows = {name: column[:1] for name, column in datamodule.rows["test"][:].items()}

    def bleu(text):
        return datamodule.scorer(rows, respond(datamodule, [text])).quality["bleu"]

    # n-gram precisions 5/6, 4/5, 3/4, 2/3 against the closer reference, whose product is 1/3; no brevity penalty.
    assert bleu("a b c d e f") == pytest.approx(100 * (1 / 3) ** 0.25, rel=1e-5)
    assert bleu("a b c d e g") == pytest.approx(100)
    # Five of six words: all precisions are 1, the brevity penalty is exp(1 - 6/5).
    assert bleu("a b c d e") == pytest.approx(100 * 2.718281828 ** (1 - 6 / 5), rel=1e-5)
    assert bleu("f f f f f f") == 0


def test_self_bleu_by_hand():
    texts, prompts = ["a b c d", "a b c d e", "a b c d", "once", "a b c d f"], ["p", "q", "p", "r", "q"]
    # matches of 1- to 4-grams, both directions of p then of q: 8 of 8 and 8 of 10, 6/6 and 6/8, 4/4 and 4/6, 2/2 and 2/4
    expected = 100 * (16 / 18 * 12 / 14 * 8 / 10 * 4 / 6) ** 0.25
    assert self_bleu(texts, prompts) == pytest.approx(expected, rel=1e-5)
    assert self_bleu(texts, ["p", "q", "r", "s", "t"]) is None
    assert self_bleu(["a b c d", "e f g h"], ["p", "p"]) == 0


def test_self_bleu_compares_answers_of_one_prompt_whatever_row_they_stand_in(build):
    data = build(val=ROWS, test=[{"q": "x", "a": "y"}, {"q": "x", "a": "z"}, {"q": "w", "a": "z"}])
    rows = data.rows["test"].columns
    same = data.scorer(rows, respond(data, ["a b c d", "a b c d", "e f g h"])).quality["self_bleu"]
    other = data.scorer(rows, respond(data, ["a b c d", "e f g h", "a b c d"])).quality["self_bleu"]
    assert (round(same), other) == (100, 0)


def test_slot_accuracy_of_the_references(build):
    slots = {"name": "Aromi", "area": "riverside"}
    test = [{"q": slots, "a": "Aromi"}, {"q": slots, "a": "Aromi, riverside"}, {"q": {"name": "Zizzi"}, "a": "no"}]
    # the first prompt's references state 1/2 and all, in two rows; the second's nothing
    assert build(val=ROWS, test=test).facts()["reference_slot_accuracy"] == pytest.approx((0.75 + 0.75 + 0) / 3)
    assert build(val=ROWS, test=ROWS).facts()["reference_slot_accuracy"] is None


def test_slot_accuracy_by_hand(build):
    slots = {"name": "Blue Spice", "eatType": "pub", "area": "riverside", "familyFriendly": "yes"}
    test = [{"q": slots, "a": "Blue Spice"}, {"q": {"name": "Aromi"}, "a": "Aromi"}, {"q": {"family": "no"}, "a": "x"}]
    datamodule = build(val=ROWS, test=test, prompt_length=96, response_length=40)
    rows = datamodule.rows["test"][:]

    def slot_accuracy(*texts):
        return datamodule.scorer(rows, respond(datamodule, texts)).quality["slot_accuracy"]

    # The row without a slot to look for does not count: (2/3 + 1) / 2, then (2/3 + 0) / 2.
    assert slot_accuracy("blue spice, RIVERSIDE, public", "Aromi.", "") == pytest.approx(5 / 6)
    assert slot_accuracy("blue spice, riverside, public", "Aroma", "yes") == pytest.approx(1 / 3)
    score = datamodule.scorer(rows, respond(datamodule, ["Blue Spice pub riverside", "Aromi", ""]))
    assert score.quality["slot_accuracy"] == 1.0
    assert score.ci95["slot_accuracy"] == (1.0, 1.0)


@pytest.mark.parametrize(("value", "found"), [("more than £30", 1.0), ("£20-25", 0.0), ("5 out of 5", 0.0)])
def test_slot_values_with_signs_are_looked_for_as_whole_words(value, found):
    assert slot_share({"x": value}, "more than £30, £20-250, 15 out of 5") == found


def test_no_rows_give_no_figures(build):
    datamodule = build()
    rows = {name: column[:0] for name, column in datamodule.rows["test"][:].items()}
    score = datamodule.scorer(rows, torch.zeros(0, datamodule.response_length, dtype=torch.long))
    assert set(score.quality.values()) == {None}
    assert score.distinct is None


# -- order of rows ---------------------------------------------------------------------------------------------------


def order(loader):
    return [batch["row_index"].tolist() for batch in loader]


def test_the_same_seed_gives_the_same_order_and_each_epoch_another(build):
    same = {"val": ROWS, "test": ROWS}
    first, again, other = (build(seed=seed, **same).train_dataloader() for seed in (1, 1, 2))
    assert order(first) == order(again) != order(other)
    first.set_epoch(1)
    assert order(first) != order(again)
    assert order(build(**same).val_dataloader()) == order(build(**same).val_dataloader())


@pytest.mark.filterwarnings("ignore:.*no optimizer", "ignore:.*returned .None.", "ignore:.*no .validation_step")
def test_a_trainer_tells_the_loader_its_epoch(build):
    class Reader(LightningModule):
        def training_step(self, batch, batch_idx):
            read.append(batch["row_index"].tolist())

        def configure_optimizers(self):
            return None

    datamodule, read = build(val=ROWS, test=ROWS), []
    quiet_trainer(-1, max_epochs=2, limit_val_batches=0).fit(Reader(), datamodule)
    first, second = datamodule.train_dataloader(), datamodule.train_dataloader()
    second.set_epoch(1)
    assert read == order(first) + order(second)
    assert order(first) != order(second)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_loader_continues_at_the_exact_batch(build, workers):
    datamodule = build(val=ROWS, test=ROWS, num_workers=workers)
    whole, cut, resumed = (datamodule.train_dataloader() for _ in range(3))
    for loader in (whole, cut, resumed):
        loader.set_epoch(2)
    batches = iter(cut)
    read = [next(batches)["row_index"].tolist() for _ in range(2)]
    resumed.load_state_dict(cut.state_dict())
    rest = order(resumed)
    assert len(rest) == 4
    assert read + rest == order(whole)
    resumed.set_epoch(3)
    assert len(order(resumed)) == 6


@pytest.mark.parametrize(("rows", "drop_last"), [(11, False), (9, False), (12, False), (12, True)])
def test_two_ranks_see_each_row_exactly_once(rows, drop_last, monkeypatch):
    batches = []
    for rank in range(2):
        monkeypatch.setattr("datamodules.loader.rank_and_world", lambda rank=rank: (rank, 2))
        sampler = EpochSampler(rows, 2, shuffle=True, drop_last=drop_last, seed=5)
        batches.append(list(sampler))
    seen = [row for rank in batches for batch in rank for row in batch]
    assert sorted(seen) == list(range(rows))
    monkeypatch.setattr("datamodules.loader.rank_and_world", lambda: (0, 1))
    # Together the ranks see the batches that one rank with twice the batch size sees.
    one = list(EpochSampler(rows, 4, shuffle=True, drop_last=drop_last, seed=5))
    assert [sorted(a + b) for a, b in zip(*batches, strict=False)] == [
        sorted(batch) for batch in one[: len(batches[1])]
    ]


def test_prompts_end_in_a_mark_that_is_not_shown(build):
    marked, plain = build(), build(mark_prompt_end=False)
    for data, ends in ((marked, True), (plain, False)):
        rows = data.rows["train"].columns
        last = rows["input_ids"][:, data.prompt_length - 1]
        assert (last == data.tokenizer.eos_token_id).all() == ends
        asked = data.encode_prompts(["jump"])
        assert bool(asked["input_ids"][0, data.prompt_length - 1] == data.tokenizer.eos_token_id) == ends
        assert data.decode_prompts(asked) == ["jump"]


def test_slots_of_dictionary_prompts_are_known_attributes_of_their_texts(build):
    train = [
        {"q": {"name": n, "food": f}, "a": f"{n} {f}"} for n in ("Aromi", "Blue", "Cocum") for f in ("Thai", "Pub")
    ]
    test = [{"q": {"name": "Blue"}, "a": "Blue"}, {"q": {"food": "Thai", "name": "Aromi"}, "a": "Aromi"}]
    data = build(train=train, test=test)
    assert data.attribute_names == ["food", "name"]
    plans = {split: data.attributes_of(data.rows[split].columns) for split in ("train", "test")}
    train_names = dict(zip(split_prompts(data, "train"), plans["train"].tolist(), strict=True))
    (blue, aromi) = plans["test"].tolist()
    assert blue[0] == 0  # no food is said
    seen = {prompt: plan for prompt, plan in train_names.items() if "Blue" in prompt}
    assert all(plan[1] == blue[1] for plan in seen.values())
    assert all(plan[1] == aromi[1] for prompt, plan in train_names.items() if "Aromi" in prompt)
    told = data.signals(data.rows["test"].columns)
    assert {name: values.tolist() for name, values in told.items()} == {
        "food": [0, aromi[0]],
        "name": [blue[1], aromi[1]],
    }
    assert data.signal_sizes == {"food": 3, "name": 4}  # none is a value too
    plain = build(setup=True)  # prompts that are text
    assert plain.attributes_of({"row_index": torch.tensor([0])}) is None
    assert plain.signal_sizes == {}
