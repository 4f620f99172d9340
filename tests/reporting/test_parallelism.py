"""Accuracy under parallelism: by hand, and what follows from its definition."""

import math
import random

import pytest

from reporting.parallelism import accuracy_under_parallelism, accuracy_weight, not_dominated


def plain_area(points: list) -> float:
    return accuracy_under_parallelism(points, best=1.0)  # every accuracy is above it, so that nothing is weighted


def test_the_sum_by_hand():
    """ρ_1 y_1 = 80; to (2, 78): (78 W(78) + 80) / 2; to (4, 76): (76 W(76) + 78 W(78)); (8, 74.9) lost more than 5."""
    second, third = 78 * math.exp(-3 * 2 / 80), 76 * math.exp(-3 * 4 / 80)
    expected = 80 + (80 + second) / 2 + (second + third)
    points = [(4.0, 76.0), (1.0, 80.0), (8.0, 74.9), (2.0, 78.0)]  # in any order
    assert accuracy_under_parallelism(points, 80.0) == pytest.approx(expected, rel=1e-12)
    # exactly 5 percent less still counts
    fourth = 75 * math.exp(-3 * 5 / 80)
    points[2] = (8.0, 75.0)
    assert accuracy_under_parallelism(points, 80.0) == pytest.approx(expected + 2 * (third + fourth), rel=1e-12)


def test_the_weight():
    assert accuracy_weight(50.0, 100.0) == pytest.approx(math.exp(-1.5))
    assert accuracy_weight(100.0, 100.0) == accuracy_weight(120.0, 100.0) == 1.0
    assert accuracy_weight(0.0, 0.0) == 1.0  # nothing is right, and nothing better is known
    assert accuracy_weight(50.0, 100.0, penalty=0.0) == 1.0


def test_one_point_is_a_rectangle_and_no_loss_is_plain_area():
    assert accuracy_under_parallelism([(3.0, 60.0)], 90.0) == 180.0
    assert accuracy_under_parallelism([(1.0, 90.0), (5.0, 90.0)], 90.0) == pytest.approx(450.0)
    # a better method elsewhere lowers it, from the first point on
    assert accuracy_under_parallelism([(1.0, 90.0), (5.0, 90.0)], 95.0) < 450.0


def fronts(n: int) -> list[tuple[list, float]]:
    """Random points of falling accuracy, and a best accuracy."""
    draw = random.Random(0)
    found = []
    for _ in range(n):
        rho = sorted(draw.uniform(1, 16) for _ in range(5))
        y = sorted((draw.uniform(80, 84.9) for _ in range(5)), reverse=True)
        found.append((list(zip(rho, y, strict=True)), draw.uniform(85, 100)))
    return found


def test_what_follows_from_the_definition():
    for points, best in fronts(100):
        area = accuracy_under_parallelism(points, best)
        assert area < plain_area(points)
        # twice the tokens per forward pass at the same accuracy: twice the area
        assert accuracy_under_parallelism([(2 * rho, y) for rho, y in points], best) == pytest.approx(2 * area)
        # a better last point
        (rho, y), before = points[-1], points[:-1]
        assert accuracy_under_parallelism([*before, (rho + 1, y)], best) > area
        assert accuracy_under_parallelism([*before, (rho, (y + before[-1][1]) / 2)], best) > area
        assert accuracy_under_parallelism(points, best + 1) < area


def test_a_fast_method_that_loses_accuracy_does_not_win_by_its_speed():
    """Control: by the area without weights it would."""
    careful, hasty = [(1.0, 95.0), (4.0, 95.0)], [(1.0, 60.0), (7.0, 56.0)]
    assert accuracy_under_parallelism(careful, 95.0) > accuracy_under_parallelism(hasty, 95.0)
    assert plain_area(careful) < plain_area(hasty)


def test_dominated_points_by_hand():
    points = [(1.0, 80.0), (2.0, 79.0), (2.0, 78.0), (3.0, 79.0), (4.0, 70.0), (4.0, 70.0), (0.5, 80.0)]
    assert not_dominated(points) == [(1.0, 80.0), (3.0, 79.0), (4.0, 70.0)]
    assert not_dominated([]) == []


def test_a_dominated_point_changes_nothing_once_it_is_left_out():
    """Control: left in, it would lower the area."""
    for points, best in fronts(20):
        between = (points[1][0] + points[2][0]) / 2
        worse = [*points, (between, points[2][1] - 1)]
        assert not_dominated(worse) == points
        assert accuracy_under_parallelism(not_dominated(worse), best) == accuracy_under_parallelism(points, best)
        assert accuracy_under_parallelism(worse, best) < accuracy_under_parallelism(points, best)
