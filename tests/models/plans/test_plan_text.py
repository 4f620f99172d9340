"""Codes with names are written and read by them; a plan that is written is read as itself."""

import pytest
import torch

from models.functional.errors import UsageError
from models.plans.plan_text import parse_plan, plan_texts
from models.plans.vocabulary import ConceptVocabulary

VOCABULARY = ConceptVocabulary({"name": {"codes": 7}, "a": {"codes": 3, "most": 2, "least": 0}}, 11)
NAMES = {"name": ["none", "The Mill", "5", 'a "b" \\c', "none", "two\nlines"]}


def written(code: int) -> str:
    (line,) = plan_texts(VOCABULARY, torch.tensor([[1 + code, 3, 1]]), NAMES)
    return line


def test_names_in_place_of_numbers():
    assert written(0) == "name=none a=2,0"
    assert written(1) == 'name="The Mill" a=2,0'
    assert written(4) == "name=4 a=2,0"  # its name is that of an earlier code
    assert written(5) == "name=code5 a=2,0"  # a name that is no line stays a number, which another code has as its name
    assert written(6) == "name=6 a=2,0"
    assert plan_texts(VOCABULARY, torch.tensor([[2, 0, 0]])) == ["name=1 a=none"]


@pytest.mark.parametrize("code", range(7))
def test_a_plan_is_read_as_it_is_written(code):
    assert parse_plan(VOCABULARY, written(code), NAMES) == {0: 1 + code, 1: 3, 2: 1}


def test_a_number_is_read_too():
    assert parse_plan(VOCABULARY, "name=1", NAMES) == parse_plan(VOCABULARY, 'name="The Mill"', NAMES) == {0: 2}
    assert parse_plan(VOCABULARY, "name=1") == {0: 2}


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ('name="The Mall"', "“name=The Mall” must be a number from 0 to 6, or one of none, The Mill, 5"),
        ("name=1code2", "“name=1code2” must be a number from 0 to 6"),
        ('name="The Mill', "has a quote without its end"),
        ("name=The Mill", "“name=The” must be a number from 0 to 6, or one of none, The Mill"),
    ],
)
def test_mistakes(plan, sentence):
    with pytest.raises(UsageError, match=sentence):
        parse_plan(VOCABULARY, plan, NAMES)
