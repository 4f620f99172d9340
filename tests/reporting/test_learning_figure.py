"""Learning curves of several records: seeds share their points, costs are in tokens and FLOPs, the truth is taken off."""

import math

import pytest

from reporting.intervals import half_width
from reporting.learning_figure import learning_curves, learning_figure


def record(seed: int, nll: list[float], experiment: str = "one", bound: bool = False, truth: bool = True) -> dict:
    steps = [10 * (k + 1) for k in range(len(nll))]
    curve = {"steps": steps, "tokens": [3 * n for n in steps], "nll": nll}
    if truth:
        curve["nll_truth"] = [0.5] * len(nll)
    quality = {"flops_per_step": 2e9, "nll_bound" if bound else "nll": nll[-1]}
    rows = [{"method": "teacher", "quality": {}}, {"method": "model", "quality": quality, "curve": curve}]
    return {"experiment": experiment, "seed": seed, "data": {"name": "oracle"}, "rows": rows}


def test_half_width_by_hand():
    assert half_width([0.7, 0.8, 0.6]) == pytest.approx(4.3026527 * 0.1 / math.sqrt(3))
    assert half_width([0.7]) is None


def test_seeds_meet_at_their_steps_and_a_repeat_replaces_the_earlier_run():
    records = [record(0, [9.0]), record(0, [2.0, 1.0]), record(1, [3.0, 2.0, 1.0]), record(0, [1.0], "two", bound=True)]
    one, two = learning_curves(records)
    assert (one.experiment, one.bound, one.seeds) == ("one", False, 2)
    assert (two.experiment, two.bound, two.seeds) == ("two", True, 1)
    first, second = one.shared()  # the third point is of one seed alone
    assert first["nll"] == [2.0, 3.0]
    assert first["above"] == [1.5, 2.5]
    assert second["tokens"] == [60, 60]
    assert second["flops"] == [4e10, 4e10]


@pytest.mark.parametrize("truth", [True, False])
def test_the_figure_shows_what_is_above_the_truth_where_it_is_known(truth):
    figure = learning_figure(learning_curves([record(seed, [2.0, 1.0], truth=truth) for seed in (0, 1)]))
    tokens, flops = figure.subfigs[0].axes
    assert tokens.get_title() == ("NLL above the data's own, nats a token" if truth else "NLL, nats a token")
    assert tokens.lines[0].get_xydata().tolist() == [[3e-5, 1.5 if truth else 2.0], [6e-5, 0.5 if truth else 1.0]]
    assert flops.lines[0].get_xdata().tolist() == [0.02, 0.04]


def test_records_without_a_curve_have_none():
    plain = record(0, [1.0])
    del plain["rows"][1]["curve"]
    assert learning_curves([plain]) == []
