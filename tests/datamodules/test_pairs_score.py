"""Figures of responses to prompts from files, by hand."""

import pytest
import torch
from helpers.pairs import ROWS, respond

from datamodules.pairs_score import self_bleu, slot_share

# -- scorer ----------------------------------------------------------------------------------------------------------


def test_exact_match_takes_any_reference_of_the_same_prompt_in_the_split(build_pairs):
    test = [{"q": "jump", "a": "J"}, {"q": "jump", "a": "hop"}, {"q": "walk", "a": "W W"}, {"q": "run", "a": "R"}]
    datamodule = build_pairs(val=[{"q": "run", "a": "sprint"}], test=test)
    score = datamodule.scorer(datamodule.rows["test"][:], respond(datamodule, ["hop", "hop", "W", "sprint"]))
    assert score.quality["exact_match"] == 0.5
    assert score.distinct == 0.75
    assert score.quality["validity"] is score.quality["slot_accuracy"] is score.entropy is None
    low, high = score.ci95["exact_match"]
    assert low == pytest.approx(0.150, abs=1e-3)
    assert high == pytest.approx(0.850, abs=1e-3)
    truth = datamodule.rows["test"][:]["input_ids"][:, -datamodule.response_length :]
    assert datamodule.scorer(datamodule.rows["test"][:], truth).quality["exact_match"] == 1.0


def test_what_follows_end_of_text_is_not_judged(build_pairs):
    datamodule = build_pairs(val=ROWS, test=[{"q": "jump", "a": "J"}])
    responses = respond(datamodule, ["JxW"])
    responses[0, 1] = datamodule.tokenizer.eos_token_id
    assert datamodule.scorer(datamodule.rows["test"][:], responses).quality["exact_match"] == 1.0


def test_words_are_judged_as_the_tokenizer_writes_them(build_pairs):
    test = [{"q": "jump", "a": "J  W"}, {"q": "jump and jump", "a": "J unheard"}]
    datamodule = build_pairs(val=ROWS, test=test, tokenizer="words")
    rows = datamodule.rows["test"][:]
    score = datamodule.scorer(rows, rows["input_ids"][:, -datamodule.response_length :])
    # The second row cannot be right: the tokenizer does not know its word, and "<unk>" is no answer.
    assert score.quality["exact_match"] == 0.5


def test_bleu_by_hand(build_pairs):
    test = [{"q": "x", "a": "a b c d e g"}, {"q": "x", "a": "z"}]
    datamodule = build_pairs(val=ROWS, test=test)
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


def test_self_bleu_compares_answers_of_one_prompt_whatever_row_they_stand_in(build_pairs):
    data = build_pairs(val=ROWS, test=[{"q": "x", "a": "y"}, {"q": "x", "a": "z"}, {"q": "w", "a": "z"}])
    rows = data.rows["test"].columns
    same = data.scorer(rows, respond(data, ["a b c d", "a b c d", "e f g h"])).quality["self_bleu"]
    other = data.scorer(rows, respond(data, ["a b c d", "e f g h", "a b c d"])).quality["self_bleu"]
    assert (round(same), other) == (100, 0)


def test_slot_accuracy_of_the_references(build_pairs):
    slots = {"name": "Aromi", "area": "riverside"}
    test = [{"q": slots, "a": "Aromi"}, {"q": slots, "a": "Aromi, riverside"}, {"q": {"name": "Zizzi"}, "a": "no"}]
    # the first prompt's references state 1/2 and all, in two rows; the second's nothing
    assert build_pairs(val=ROWS, test=test).facts()["reference_slot_accuracy"] == pytest.approx((0.75 + 0.75 + 0) / 3)
    assert build_pairs(val=ROWS, test=ROWS).facts()["reference_slot_accuracy"] is None


def test_slot_accuracy_by_hand(build_pairs):
    slots = {"name": "Blue Spice", "eatType": "pub", "area": "riverside", "familyFriendly": "yes"}
    test = [{"q": slots, "a": "Blue Spice"}, {"q": {"name": "Aromi"}, "a": "Aromi"}, {"q": {"family": "no"}, "a": "x"}]
    datamodule = build_pairs(val=ROWS, test=test, prompt_length=96, response_length=40)
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


@pytest.mark.filterwarnings("ignore:data.test is not set")
def test_no_rows_give_no_figures(build_pairs):
    datamodule = build_pairs()
    rows = {name: column[:0] for name, column in datamodule.rows["test"][:].items()}
    score = datamodule.scorer(rows, torch.zeros(0, datamodule.response_length, dtype=torch.long))
    assert set(score.quality.values()) == {None}
    assert score.distinct is None
