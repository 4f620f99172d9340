"""Texts end before their stop strings, and generation sees a stop string as soon as it is spelled."""

import pytest
import torch

from models.functional.stop_strings import cut_at_stops, holds_stop


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "e"], "on"),
        ("one", ["two"], "one"),
        ("one", [], "one"),
        ("one", [""], "one"),
        ("Q: 1\n\nQ: 2", ["\n\n"], "Q: 1"),
        ("ab", ["b", "ab"], "a"),  # the second finds nothing in what the first has left
    ],
)
def test_a_text_is_cut_at_each_stop_in_turn(text, stops, left):
    assert cut_at_stops(text, stops) == left


def decode(ids: list[int]) -> str:
    return "".join("ab\nc"[k] for k in ids)


def test_a_stop_is_seen_when_its_last_token_comes():
    tokens = torch.tensor([[0, 1, 2, 2], [3, 0, 0, 1]])
    seen = [holds_stop(tokens[:, :n], decode, ["\n\n", "ab"]).tolist() for n in range(1, 5)]
    assert seen == [[False, False], [True, False], [False, False], [True, True]]
    assert not holds_stop(tokens, decode, [""]).any()
    assert not holds_stop(tokens, decode, []).any()


def test_a_text_is_decoded_whole_before_it_is_believed():
    """The end of a text may be decoded differently from the whole, as with tokens that share a character."""

    def only_whole(ids: list[int]) -> str:
        return decode(ids) if len(ids) == 2 else "-" * len(ids)

    assert not holds_stop(torch.tensor([[3, 0, 1]]), only_whole, ["ab"]).any()
