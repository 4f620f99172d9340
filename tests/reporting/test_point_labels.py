"""Labels of a figure's points: inside their panel, beside one another, off the lines."""

import math
from itertools import combinations

import pytest
from helpers.record import make_record, quality, row
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from reporting.point_labels import PointLabel, place_labels
from reporting.publish import DOCS, RECORDS
from reporting.record import read_record
from reporting.tpf_figure import tpf_curves, tpf_figure


def boxes(axis):
    """Where the letters of each label are, in pixels, and where the panel is."""
    figure = axis.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    # of an annotation with a line to its point the letters alone
    own = {text.get_text(): Text.get_window_extent(text, renderer) for text in axis.texts}
    return own, axis.get_window_extent()


def hidden(axis):
    """Pairs of labels that lie on each other, and labels that leave the panel."""
    own, panel = boxes(axis)
    pairs = [{a, b} for (a, one), (b, other) in combinations(own.items(), 2) if one.overlaps(other)]
    beyond = [
        name for name, box in own.items()
        if not (panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1)
    ]  # fmt: skip
    return pairs, beyond


def crossed(axis):
    """Labels through which the line from another label to its point passes."""
    own, _ = boxes(axis)
    found = set()
    for text in axis.texts:
        if text.arrow_patch is not None:
            box, start = own[text.get_text()], axis.transData.transform(text.xy)
            middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
            line = [start + (middle - start) * k / 100 for k in range(101)]
            found |= {
                name for name, other in own.items()
                if name != text.get_text() and any(other.contains(*point) for point in line if not box.contains(*point))
            }  # fmt: skip
    return found


def decoders(method, named):
    """named: {decoder: (NFE, TPF, validity)}."""
    for name, (nfe, tpf, share) in named.items():
        made = row(method, name, nfe, quality(validity=share))
        yield made | {"cost": made["cost"] | {"tokens_per_forward": tpf}}


SCAN = DOCS / RECORDS / "scan" / "scan_meanflow_scan_0.json"
CROWDED = {
    "teacher, greedy": (8, 0.88, 0.997),
    "teacher, factor 0.25": (1.18, 5.96, 0.994),
    "teacher, entropy ≤ 0.05": (1.14, 6.20, 0.9939),
    "teacher, factor 0.5": (1.13, 6.23, 0.9938),
    "teacher, confidence ≥ 0.95": (1.12, 6.32, 0.993),
    "teacher, confidence ≥ 0.9": (1.08, 6.49, 0.992),
    "teacher, entropy ≤ 0.8": (1.02, 6.90, 0.980),
    "teacher, one": (1, 7.05, 0.975),
}
AT_THE_EDGES = {f"denoiser's flow of {n}": (n, 16 / n, 1.0 - 0.003 * 16 / n) for n in (1, 2, 4, 8, 16)}


def test_labels_of_neighbouring_points_and_of_those_at_the_edges_are_legible():
    rows = [*decoders("teacher", CROWDED), *decoders("student", AT_THE_EDGES)]
    (axis,) = tpf_figure(tpf_curves([make_record(rows)])).axes
    assert len(axis.texts) == len(CROWDED) + len(AT_THE_EDGES)
    assert hidden(axis) == ([], [])


def test_lines_to_labels_pass_beside_other_labels():
    """A published run: fifteen decoders of a teacher between one and two passes, a student at the same ones."""
    (axis,) = tpf_figure(tpf_curves([read_record(SCAN)])).axes
    assert sum(text.arrow_patch is not None for text in axis.texts) > 1
    assert hidden(axis) == ([], [])
    assert crossed(axis) == set()


def test_labels_at_one_place_would_hide_each_other():
    axis = Figure(figsize=(6, 4)).subplots()
    axis.plot([0, 1], [0, 1])
    for name in ("one of them", "another"):
        axis.annotate(name, (1, 1), xytext=(2, 2), textcoords="offset points")
    pairs, beyond = hidden(axis)
    assert pairs == [{"one of them", "another"}]
    assert set(beyond) <= {"one of them", "another"}


def test_a_label_is_beside_its_point_and_off_the_lines():
    """Away from a line that falls to the right, and with a line of its own where it is far from its point."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1, 2], [2, 1, 0], "o-")
    place_labels(axis, [PointLabel(f"point {k}", (k, 2 - k), "black") for k in (0, 1, 2)])
    own, _ = boxes(axis)
    for k in (0, 1, 2):
        x, y = axis.transData.transform((k, 2 - k))
        box = own[f"point {k}"]
        away = math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))
        assert 0 < away < 15
        assert not any(box.contains(*axis.transData.transform((t / 50, 2 - t / 50))) for t in range(101))


def test_labels_of_one_point_stand_around_it_each_with_a_line_where_it_is_far():
    axis = Figure(figsize=(6, 4)).subplots()
    axis.plot([0, 1, 2], [2, 1, 0], "o-")
    place_labels(axis, [PointLabel(f"again {k}", (1, 1), "black") for k in range(9)])
    assert any(text.arrow_patch is not None for text in axis.texts)
    assert hidden(axis) == ([], [])


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_labels_stay_in_place_when_the_figure_is_saved_at_another_resolution(scale, tmp_path):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([1, 2], [1, 2], "o-")
    axis.set_xscale(scale)
    place_labels(axis, [PointLabel(str(k), (k, k), "black") for k in (1, 2)])
    before, panel = boxes(axis)
    figure.savefig(tmp_path / "made.png", dpi=2 * figure.dpi)
    after, again = boxes(axis)
    assert panel.bounds == pytest.approx(again.bounds, abs=0.01)
    for name, box in before.items():
        assert box.bounds == pytest.approx(after[name].bounds, abs=0.01)  # pixels
