"""The figure of q_α: two lines and a star at the record's own numbers."""

from helpers.record import make_record

from reporting.alpha_figure import alpha_figure
from reporting.sentences import in_words

CURVE = {
    "alphas": [0.0, 0.5, 1.0],
    "kl_theta": [0.4, 0.2, 0.0],
    "kl_target": [0.0, 0.1, 0.3],
    "alpha_star": 0.625,
    "kl_star": 0.15,
    "alpha_mean": 0.5,
    "chernoff_mean": 0.125,
    "positions": 64,
}


def test_the_figure_has_both_curves_and_the_star():
    figure = alpha_figure(make_record([]) | {"alpha_curve": CURVE})
    (axis,) = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert drawn["KL(q_α‖π_θ)"] == [[0.0, 0.4], [0.5, 0.2], [1.0, 0.0]]
    assert drawn["KL(q_α‖π_t)"] == [[0.0, 0.0], [0.5, 0.1], [1.0, 0.3]]
    assert drawn["α*: both are equal"] == [[0.625, 0.15]]
    assert "α* = 0.625" in axis.get_title()


def test_other_runs_have_none():
    assert alpha_figure(make_record([])) is None
    assert not [s for s in in_words(make_record([])) if "α*" in s]


def test_a_sentence_says_the_same_numbers():
    (sentence,) = [s for s in in_words(make_record([]) | {"alpha_curve": CURVE}) if "α*" in s]
    for number in ("all 64 positions", "α* = 0.625", "0.1500 nats", "0.500", "0.1250"):
        assert number in sentence
