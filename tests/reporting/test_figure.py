"""The figure of a record."""

from helpers.record import make_record, quality, row

from reporting.figure import quality_figure

# -- figure ----------------------------------------------------------------------------------------------------------


def panels(figure) -> dict:
    return {axis.get_title(): axis for axis in figure.axes}


def points(axis, label: str) -> list[tuple[float, float]]:
    (drawn,) = [c for c in axis.containers if c.get_label() == label]
    return [(float(x), float(y)) for x, y in drawn.lines[0].get_xydata()]


def test_figure_has_a_panel_for_each_quality_of_the_oracle(oracle_record):
    found = panels(quality_figure(oracle_record))
    assert set(found) == {
        "validity",
        "exact match",
        "validity, part of the plan prompted",
        "validity, no prompt",
    }
    assert points(found["validity"], "teacher, sampled") == [(1, 0.1), (16, 0.9)]
    assert points(found["exact match"], "student, greedy") == [(1, 0.375)]
    levels = {line.get_label(): line.get_ydata()[0] for line in found["validity"].lines if len(line.get_xdata()) == 2}
    assert levels["product of marginals"] == 0.125
    assert levels["resampling floor"] == 1.0


def test_figure_has_a_panel_for_each_quality_of_a_corpus_of_files(pairs_record):
    """Validity is null everywhere and gets none; exact match, BLEU and slot accuracy are all known."""
    found = panels(quality_figure(pairs_record))
    assert "validity" not in found
    assert points(found["exact match"], "teacher, greedy") == [(1, 0.25), (8, 0.5)]
    assert points(found["slot accuracy"], "teacher, greedy") == [(1, 0.5)]  # the other one is null
    assert set(found) == {"exact match", "slot accuracy", "bleu"}
    assert points(found["bleu"], "student, greedy") == [(1, 20.0)]


def test_figure_of_a_record_that_knows_nothing_still_saves(tmp_path):
    nothing = make_record([row("teacher", "teacher", 4, quality()), row("control", "floor", 0, {})])
    quality_figure(nothing).savefig(tmp_path / "nothing.png")
    quality_figure(make_record([])).savefig(tmp_path / "empty.png")
    assert (tmp_path / "nothing.png").stat().st_size > 1000
