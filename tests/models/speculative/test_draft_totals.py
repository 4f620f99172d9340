"""Counts of drafts, by hand."""

import pytest

from models.speculative.draft_totals import DraftTotals


def test_figures_of_two_batches_by_hand():
    """Three drafts and four rounds without one: 5 of 8 verified tokens are accepted."""
    first = DraftTotals(tokens=7, drafts=2, undrafted=3, verified_at=(2, 2, 0), accepted_at=(2, 1, 0))
    second = DraftTotals(tokens=5, drafts=1, undrafted=1, verified_at=(1, 1, 1, 1), accepted_at=(1, 1, 0, 0))
    both = first + second
    assert both == DraftTotals(12, 3, 4, (3, 3, 1, 1), (3, 2, 0, 0))
    assert both.acceptance == pytest.approx(5 / 8)
    assert both.acceptance_at == pytest.approx([1, 2 / 3, 0, 0])
    assert both.accepted_length == pytest.approx(5 / 3)
    assert both.tokens_per_forward == pytest.approx(12 / 7)
    assert both.tokens_per_draft == pytest.approx(8 / 3)
    assert both.figures()["tokens_per_draft_verified"] == both.tokens_per_draft


def test_without_a_draft_there_are_no_figures():
    assert DraftTotals(tokens=4, undrafted=4).figures() == {}
    assert DraftTotals(tokens=4, undrafted=4).accepted_length == 0
    assert sum([DraftTotals(tokens=1)] * 3, DraftTotals()).tokens == 3
