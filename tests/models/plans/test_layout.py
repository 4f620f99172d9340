"""Ids, columns and positions of plans, by hand."""

import pytest
import torch
from helpers.concept import TYPES

from models.functional.errors import UsageError
from models.plans.layout import PlanLayout
from models.plans.vocabulary import ConceptVocabulary

V = ConceptVocabulary(TYPES, 100)
LAYOUT = PlanLayout(V)


def test_ids_are_one_space_behind_the_text():
    assert V.names() == [
        *("<BOS>", "<PLAN>", "<TEXT>", "<BLANK>", "<EOS>", "<PAD>", "<SEP_1>", "<SEP_2>", "<SEP_3>"),
        *("<a:0>", "<a:1>", "<a:2>", "<b:0>", "<b:1>", "<c:0>", "<c:1>", "<c:2>"),
    ]
    assert len(V.names()) == V.new
    assert (V.bos, V.eos, V.pad, V.separator(0), V.separator(2)) == (100, 104, 105, 106, 108)
    assert [list(V.codes(k)) for k in range(3)] == [[109, 110, 111], [112, 113], [114, 115, 116]]
    assert V.choices[[0, 2, 3]].tolist() == [[104, 109, 110, 111], [104, 112, 113, 105], [104, 114, 115, 116]]
    assert V.slot_types.tolist() == [0, 0, 1, 2, 2, 2]
    can_end = [True, True, False, False, True, True]
    assert V.possible[:, 0].tolist() == can_end
    assert V.possible[:, 1:].all(0).tolist() == [True, True, False]
    assert V.nominal_bits == pytest.approx(torch.tensor([1 + 3 + 9, 2, 3 + 9 + 27]).log2().sum().item())


def test_a_block_by_hand():
    """Two concepts of a and three of c at most; an <EOS> after each type, <PAD> behind it."""
    choices = torch.tensor([[2, 1, 2, 1, 2, 3], [0, 3, 1, 3, 0, 2]])
    sep, (a, b, c), end, pad = [106, 107, 108], (108, 111, 113), 104, 105  # a + k is the id of choice k
    full = [sep[0], a + 2, a + 1, end, sep[1], b + 2, end, sep[2], c + 1, c + 2, c + 3, end]
    short = [sep[0], end, pad, pad, sep[1], b + 1, end, sep[2], c + 3, end, pad, pad]
    assert LAYOUT.block(choices).tolist() == [full, short]
    opened = [[True] * 6, [True, False, True, True, True, False]]
    assert LAYOUT.open_slots(choices).tolist() == opened
    columns = LAYOUT.of_block(LAYOUT.block(choices))
    assert columns.mask.tolist() == [[i != pad for i in row] for row in (full, short)]
    assert columns.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]  # again from each separator
    assert columns.type_ids[0].tolist() == [1] * 4 + [2] * 3 + [3] * 5


def test_text_starts_at_one_place_whatever_the_plan_and_the_padding():
    mask = torch.tensor([[True, True, True, False], [False, False, True, True]])
    columns = LAYOUT.of_text(mask)
    assert LAYOUT.text_start == 5  # past 0 .. 4 of the longest type
    assert columns.position_ids[0, :3].tolist() == [6, 7, 8]
    assert columns.position_ids[1, 2:].tolist() == [6, 7]
    assert columns.type_ids.eq(0).all()
    for position, special in ((0, LAYOUT.of_special(mask)), (5, LAYOUT.of_special(mask, LAYOUT.text_start))):
        assert [field.tolist() for field in special] == [[[True]] * 2, [[position]] * 2, [[0]] * 2]


@pytest.mark.parametrize(
    ("types", "sentence"),
    [
        ({}, "module.types names no type"),
        ({"a": {"most": 1}}, r"module.types.a.codes=None must be at least 2"),
        ({"a": {"codes": 1}}, r"module.types.a.codes=1 must be at least 2"),
        ({"a": {"codes": 2, "most": None}}, "module.types.a needs most of at least 1"),
        ({"a": {"codes": 2, "most": 0}}, "most=0 least=0"),
        ({"a": {"codes": 2, "most": 1, "least": 2}}, "most=1 least=2"),
        ({"a": {"codes": 2, "size": 3}}, "module.types.a.size is not known"),
    ],
)
def test_mistakes_in_types_are_named(types, sentence):
    with pytest.raises(UsageError, match=sentence):
        ConceptVocabulary(types, 10)
