"""Labels of points in a panel, placed so that they hide neither each other nor what is drawn."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties
from matplotlib.transforms import Bbox

# ways from the point to its label, the preferred ones first: right or left, below or above
WAYS = ((1, -1), (1, 1), (-1, -1), (-1, 1), (1, 0), (-1, 0), (0, -1), (0, 1))
DISTANCES = (4, 13, 24, 36, 50, 66, 84)  # of a label from its point, points
LEADER_FROM = 12  # from this distance on a thin line leads to the label
ALIGN = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}
STEP = 3  # pixels between the samples of a line


@dataclass(frozen=True)
class PointLabel:
    """point: (x, y) in the panel's own units."""

    text: str
    point: tuple[float, float]
    colour: str


def place_labels(axis: Any, labels: Sequence[PointLabel], *, size: float = 6.5) -> None:
    """Write the labels beside their points, inside the panel. size: of the letters, points.

    Each takes the nearest free place in turn. Where none is free, it takes the one that hides least. Limits and scales of
    the panel have to be final.
    """
    figure = axis.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # the panel has its place from here on
    panel, pixels = axis.get_window_extent(), figure.dpi / 72
    drawn = np.concatenate(list(_pixels_of_lines(axis)))
    taken: list[Bbox] = []
    for label in labels:
        at = axis.transData.transform(label.point)
        width, height, _ = renderer.get_text_width_height_descent(label.text, FontProperties(size=size), False)
        places = [(distance, way) for distance in DISTANCES for way in WAYS]
        boxes = [_box(at, way, far * pixels, width, height) for far, way in places]
        leaders = [_leader(at, box, far) for box, (far, _) in zip(boxes, places, strict=True)]
        costs = [
            _cost(box, leader, panel, taken, drawn) + far
            for box, leader, (far, _) in zip(boxes, leaders, places, strict=True)
        ]
        best = int(np.argmin(costs))
        taken.append(boxes[best])
        drawn = np.concatenate([drawn, leaders[best]])
        _write(axis, label, *places[best], size)


def _pixels_of_lines(axis: Any) -> Iterator[np.ndarray]:
    """What the panel's lines and markers cover, as points (n, 2) in pixels."""
    for line in axis.lines:
        corners = axis.transData.transform(np.column_stack(line.get_data()))
        yield corners
        if line.get_linestyle() != "None":
            for start, end in pairwise(corners):
                yield _samples(start, end)


def _samples(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    steps = max(2, int(np.hypot(*(end - start)) / STEP))
    return start + np.linspace(0, 1, steps)[:, None] * (end - start)


def _leader(at: np.ndarray, box: Bbox, far: float) -> np.ndarray:
    """What the line from a point to the middle of its label covers outside of the label."""
    if far < LEADER_FROM:
        return np.empty((0, 2))
    line = _samples(at, np.array([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]))
    return line[~_inside(line, box)]


def _inside(points: np.ndarray, box: Bbox) -> np.ndarray:
    x, y = points.T
    return (box.x0 < x) & (x < box.x1) & (box.y0 < y) & (y < box.y1)


def _box(at: Iterable[float], way: tuple[int, int], far: float, width: float, height: float) -> Bbox:
    """Where a label of this size lies, in pixels."""
    x, y = (start + step * far for start, step in zip(at, way, strict=True))
    left, below = x + (way[0] - 1) / 2 * width, y + (way[1] - 1) / 2 * height
    return Bbox.from_bounds(left, below, width, height)


def _cost(box: Bbox, leader: np.ndarray, panel: Bbox, taken: list[Bbox], drawn: np.ndarray) -> float:
    """How bad a place is: outside of the panel, over other labels, over lines and markers; its leader over other labels."""
    outside = not (panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1)
    near = box.padded(2)
    over = sum(near.overlaps(other) + bool(_inside(leader, other).any()) for other in taken)
    return 10_000 * outside + 1_000 * over + 10 * int(_inside(drawn, near).sum())


def _write(axis: Any, label: PointLabel, far: float, way: tuple[int, int], size: float) -> None:
    leader = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
    written = axis.annotate(
        label.text,
        label.point,
        xytext=(far * way[0], far * way[1]),
        textcoords="offset points",
        ha=ALIGN[way[0]][0],
        va=ALIGN[way[1]][1],
        fontsize=size,
        color=label.colour,
        arrowprops=leader if far >= LEADER_FROM else None,
    )
    written.set_in_layout(False)  # the panel keeps its place
