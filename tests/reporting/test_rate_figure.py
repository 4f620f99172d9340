"""The figure of gain against rate: families of runs, none where nothing was measured, written by mode=report."""

import json

import pytest
from rich.console import Console

from reporting.gather import frontier_rows
from reporting.rate_figure import family_and_size, rate_figure
from reporting.report import report_frontier


def record(experiment: str, seed: int = 0, **quality) -> dict:
    row = {
        "method": "model", "decoder": "Planner", "nfe": 0, "quality": quality, "entropy": None, "distinct": None,
        "cost": {"tokens_per_s": None}, "n_samples": None, "ci95": {},
    }  # fmt: skip
    keys = {"commit": None, "device": "cpu", "versions": {}, "config": {}}
    return {"experiment": experiment, "seed": seed, "data": {"name": "oracle"}, "rows": [row], **keys}


RECORDS = [
    record("concept_rate/planned_2x8", rate_bits=4.0, gain_bits=2.5),
    record("concept_rate/planned_4x8", 0, rate_bits=8.0, gain_bits=5.0),
    record("concept_rate/planned_4x8", 1, rate_bits=8.4, gain_bits=5.4),
    record("concept_rate/hash_2x8", rate_bits=6.0, gain_bits=-0.5),
    record("objectives/next_token", nll=0.2),
]


def test_a_family_is_a_line_through_its_runs_in_the_order_of_their_rates():
    (axis,) = rate_figure(frontier_rows(RECORDS[::-1])).axes
    lines = {container.get_label(): container.lines[0] for container in axis.containers}
    assert set(lines) == {"concept_rate/planned", "concept_rate/hash"}
    x, y = lines["concept_rate/planned"].get_data()
    assert list(x) == pytest.approx([4.0, 8.2])
    assert list(y) == pytest.approx([2.5, 5.2])
    assert {text.get_text() for text in axis.texts} == {"2x8", "4x8"}


def test_no_figure_without_rates():
    assert rate_figure(frontier_rows(RECORDS[-1:])) is None


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a/b_2", ("a/b", "2")), ("a/b_2x8", ("a/b", "2x8")), ("concept_oracle", ("concept_oracle", ""))],
)
def test_what_stands_behind_the_last_underscore_is_the_size(name, parts):
    assert family_and_size(name) == parts


@pytest.mark.parametrize("records", [RECORDS, RECORDS[-1:]])
def test_the_report_writes_it_where_there_is_one(tmp_path, records):
    for k, one in enumerate(records):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "record.json").write_text(json.dumps(one))
    report_frontier(tmp_path, Console(quiet=True))
    assert (tmp_path / "report" / "rate.png").exists() == (len(records) > 1)
    assert ("| gain |" in (tmp_path / "report" / "frontier.md").read_text()) == (len(records) > 1)
