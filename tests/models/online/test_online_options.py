"""Options of online concepts: every choice has code, and options do not change."""

from dataclasses import FrozenInstanceError
from typing import get_args

import pytest

from models.online.growth import GROWTH
from models.online.options import Growth, OnlineConceptOptions, OnlineModelOptions


def test_every_growth_has_a_router():
    assert set(GROWTH) == set(get_args(Growth))


def test_options_are_frozen_and_a_model_keeps_its_own():
    options = OnlineConceptOptions(growth="fixed", compression=[1.0, 2.0])
    assert options.compression == (1.0, 2.0)  # a list comes from YAML
    assert options.of_model() == OnlineModelOptions(growth="fixed")
    with pytest.raises(FrozenInstanceError):
        options.growth = "null"
