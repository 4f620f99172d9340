"""Which cases of a test the default run has."""

from collections.abc import Iterable
from typing import Any

import pytest


def daily(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """The cases as parameters of a test: `chosen` run by default, the others with `pytest -m slow`."""
    cases = list(cases)
    assert all(case in cases for case in chosen)
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.slow) for case in cases]
