"""Records of a corpus whose truth is known and of one from files."""

import pytest
from helpers.record import make_record, quality, row


@pytest.fixture
def oracle_record() -> dict:
    """Every quality that the oracle corpus knows."""

    def figures(share: float) -> dict:
        kinds = {f"validity_{kind}": share / n for n, kind in enumerate(("all", "part", "none"), start=1)}
        truth = {"exact_nll": 3.21, "exact_nll_truth": 3.9, "entropy_truth": 5.67, "coverage": 0.31, "tv": 0.42}
        return quality(validity=share, exact_match=share / 2, **kinds, **truth)

    return make_record(
        [
            row("teacher", "teacher, sampled", 1, figures(0.1), entropy=5.1),
            row("teacher", "teacher, sampled", 16, figures(0.9), entropy=5.2, ci95={"validity": [0.8, 0.95]}),
            row("student", "student, greedy", 1, figures(0.75), entropy=0.0, distinct=0.25),
            row("control", "product of marginals", 0, figures(0.125), entropy=6.0),
            row("control", "resampling floor", 0, figures(1.0), entropy=5.6),
        ],
        correlation=2.34567,
    )


@pytest.fixture
def pairs_record() -> dict:
    """A corpus of files: nothing is known of validity, entropy or the truth."""
    return make_record(
        [
            row("teacher", "teacher, greedy", 1, quality(exact_match=0.25, bleu=12.5, slot_accuracy=0.5)),
            row("teacher", "teacher, greedy", 8, quality(exact_match=0.5, bleu=25.0, slot_accuracy=None)),
            row("student", "student, greedy", 1, quality(exact_match=0.375, bleu=20.0, slot_accuracy=0.625)),
        ]
    )
