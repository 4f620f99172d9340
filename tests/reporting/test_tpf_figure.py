"""Quality against tokens per forward pass: which points make a curve, its area in records and reports, and its picture."""

import json
import math

import pytest
from helpers.record import make_record, quality, row
from rich.console import Console

from reporting.report import report_frontier
from reporting.sentences import in_words
from reporting.tpf_figure import aup_of, aup_sentences, tpf_curves, tpf_figure


def decoder(method: str, name: str, nfe: float, tpf: float | None, **figures: float) -> dict:
    made = row(method, name, nfe, quality(**figures))
    return made | {"cost": made["cost"] | {"tokens_per_forward": tpf}}


def rows() -> list[dict]:
    return [
        decoder("teacher", "teacher, greedy", 8, 1.0, validity=0.80, exact_match=0.1),
        decoder("teacher", "teacher, greedy", 4, 2.0, validity=0.70),  # the rule below is better in both
        decoder("teacher", "teacher, confidence ≥ 0.9", 3.2, 2.5, validity=0.78),
        decoder("student", "student", 1, 8.0, validity=0.75),
        decoder("control", "resampling floor", 0, None, validity=1.0),
        {**decoder("model", "MaskedDiffusion", 0, None), "curve": {}},
    ]


TEACHER = 80 + 1.5 * (80 + 78 * math.exp(-3 * 2 / 80)) / 2


def test_all_decoders_of_a_method_share_one_curve_and_rules_among_them():
    teacher, student = sorted(tpf_curves([make_record(rows())]), key=lambda curve: curve.method, reverse=True)
    assert teacher.quality == "validity"
    assert teacher.points() == {
        ("teacher, greedy", 8): (1.0, 0.8),
        ("teacher, greedy", 4): (2.0, 0.7),
        ("teacher, confidence ≥ 0.9", 0): (2.5, 0.78),
    }
    assert teacher.front() == [(1.0, 0.8), (2.5, 0.78)]
    assert teacher.y_max == student.y_max == 0.8  # of what generates with a network, not of a control
    assert teacher.aup() == [pytest.approx(TEACHER)]
    assert student.aup() == []  # a single decoder has no curve


def test_the_record_has_the_area_of_each_method_with_several_decoders():
    record = make_record([*rows(), decoder("student", "student", 2, 4.0, validity=0.80)])
    expected = 4 * 80 + 4 * (80 + 75 * math.exp(-3 * 5 / 80)) / 2
    found = aup_of(record)
    assert found == {
        "quality": "validity",
        "y_max": 0.8,
        "methods": {"teacher": pytest.approx(TEACHER), "student": pytest.approx(expected)},
    }
    (sentence,) = [s for s in in_words(record | {"aup": found}) if s.startswith("AUP")]
    assert f"teacher {TEACHER:.1f}, student {expected:.1f}" in sentence
    assert "AUP" not in " ".join(in_words(record))


def test_no_area_of_what_is_no_accuracy_or_has_no_tpf():
    judged = [decoder("student", "student", n, 8.0 / n, judge_perplexity=50.0 - n) for n in (1, 2)]
    assert aup_of(make_record(judged)) is None
    (curve,) = tpf_curves([make_record([*judged, decoder("student", "slow", 4, 1.0, judge_perplexity=60.0)])])
    assert curve.front() == [(4.0, 48.0), (8.0, 49.0)]  # of a perplexity less is better
    assert aup_sentences([curve]) == {}
    older = make_record([row("teacher", "teacher", n, quality(validity=0.5)) for n in (1, 2)])  # without TPF
    assert aup_of(older) is None
    assert tpf_figure(tpf_curves([older])) is None
    assert tpf_curves([make_record([])]) == []
    drafted = make_record(rows())  # two models, and drafts that change nothing of the distribution
    drafted["rows"][3]["cost"]["speedup_vs_naive"] = 1.2
    assert tpf_curves([drafted]) == []


def test_the_first_quality_that_a_corpus_knows_and_zeros_everywhere():
    pairs = [decoder("teacher", "teacher", n, 8.0 / n, bleu=2.0 * n, slot_accuracy=0.0) for n in (1, 2)]
    assert aup_of(make_record(pairs))["methods"] == {"teacher": 0.0}
    for made in pairs:
        del made["quality"]["slot_accuracy"]
    found = aup_of(make_record(pairs))
    assert (found["quality"], found["y_max"]) == ("bleu", 4.0)  # BLEU is a percentage already
    assert found["methods"]["teacher"] == pytest.approx(4 * 4 + 4 * (4 + 2 * math.exp(-1.5)) / 2)


def test_seeds_become_an_interval_and_experiments_of_a_corpus_share_the_best_quality(tmp_path):
    records = []
    for seed, loss in ((0, 0.0), (1, 0.01)):
        teacher = [decoder("teacher", "teacher", n, 8.0 / n, validity=0.9 - loss) for n in (1, 2)]
        records.append(make_record(teacher) | {"seed": seed})
    better = [decoder("student", "student", n, 8.0 / n, validity=1.0) for n in (1, 2)]
    records.append(make_record(better) | {"experiment": "other", "seed": 0})
    curves = {curve.experiment: curve for curve in tpf_curves(records)}
    one, two = curves["trial"].aup()  # (4, y) and (8, y): the front is the faster one alone
    assert (one, two) == (pytest.approx(8 * 90), pytest.approx(8 * 89))
    assert curves["trial"].y_max == 1.0
    assert curves["trial"].points()["teacher", 1] == (8.0, pytest.approx(0.895))
    for k, record in enumerate(records):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "record.json").write_text(json.dumps(record))
    console = Console(width=120, record=True)
    report_frontier(tmp_path, console)
    line = "corpus: AUP of validity (y_max 100.0 %): other student 800.0, trial teacher 716.0 ± 50.8"
    assert line in console.export_text()
    assert line in (tmp_path / "report" / "frontier.md").read_text()
    assert (tmp_path / "report" / "tpf.png").stat().st_size > 1000


def test_the_figure_shows_every_point_and_a_line_along_the_best():
    curves = tpf_curves([make_record(rows())])
    (axis,) = tpf_figure(curves).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert drawn[f"trial, teacher: AUP {TEACHER:.1f}"] == [[1.0, 0.8], [2.0, 0.7], [2.5, 0.78]]
    assert drawn["trial, student"] == [[8.0, 0.75]]
    assert [[1.0, 0.8], [2.5, 0.78]] in drawn.values()
    assert {text.get_text() for text in axis.texts} == {"greedy, NFE 8", "confidence ≥ 0.9", "student, NFE 1"}
    assert (axis.get_ylabel(), axis.get_title()) == ("validity", "corpus")
