"""The frontier of several records: seeds become intervals, repeats replace each other, files are written."""

import json
import math

import pytest
from rich.console import Console

from reporting.gather import frontier_figure, frontier_markdown, frontier_rows, frontier_table
from reporting.report import report_frontier


def record(seed, validity, experiment="one", corpus="oracle", decoder="student", nfe=1):
    row = {
        "method": "student", "decoder": decoder, "nfe": nfe, "quality": {"validity": validity, "bleu": None},
        "entropy": None, "distinct": None, "cost": {"tokens_per_s": 100.0}, "n_samples": 4, "ci95": {},
    }  # fmt: skip
    control = row | {"method": "control", "decoder": "floor", "nfe": 0, "cost": {"tokens_per_s": None}}
    keys = {"commit": None, "device": "cpu", "versions": {}, "config": {}}
    return {"experiment": experiment, "seed": seed, "data": {"name": corpus}, "rows": [row, control], **keys}


def test_seeds_become_a_mean_and_its_interval_and_a_repeat_replaces_the_earlier_run():
    rows = frontier_rows([record(0, 0.1), record(1, 0.8), record(2, 0.6), record(0, 0.7)])
    student = next(row for row in rows if row.method == "student")
    assert student.seeds == 3
    assert student.mean("validity") == pytest.approx(0.7)
    assert student.half_width("validity") == pytest.approx(4.3026527 * 0.1 / math.sqrt(3))
    assert student.mean("bleu") is None
    single = frontier_rows([record(0, 0.5)])[0]
    assert single.half_width("validity") is None


def test_what_is_not_alike_stays_apart():
    rows = frontier_rows(
        [record(0, 0.5), record(0, 0.6, experiment="two"), record(0, 0.7, nfe=2), record(0, 1, corpus="b")]
    )
    assert [(r.corpus, r.experiment, r.nfe) for r in rows if r.method == "student"] == [
        ("b", "one", 1), ("oracle", "one", 1), ("oracle", "one", 2), ("oracle", "two", 1),
    ]  # fmt: skip


def test_what_drafts_counted_is_one_row_and_of_exactness_the_worst_seed_is_shown():
    """Forward passes of a drafted text differ from seed to seed; a p-value or a largest error has no mean worth reading."""
    records = [record(seed, 0.5, decoder="q*", nfe=19 + seed) for seed in (0, 1, 2)]
    for seed, known in enumerate(records):
        known["rows"][0]["cost"] = {"tokens_per_s": 1.0, "speedup_vs_naive": 1.1}
        known["rows"][0]["quality"] |= {"g_test_p": (0.4, 0.2, 0.9)[seed], "max_enumeration_error": 10.0 ** (seed - 20)}
    (row,) = (row for row in frontier_rows(records) if row.decoder == "q*")
    assert (row.seeds, row.nfe) == (3, 20)
    (line,) = (line for line in frontier_markdown([row]).splitlines() if "q*" in line)
    assert "| 0.200 | 1e-18 |" in line
    assert "1.10 ± 0.00" in line


def test_table_and_figure_show_what_there_is():
    rows = frontier_rows([record(0, 0.5), record(1, 0.7)])
    text = frontier_markdown(rows)
    assert "0.600 ± 1.271" in text
    assert "BLEU" not in text
    assert len(frontier_table(rows, width=40).columns) < len(frontier_table(rows, width=200).columns)
    axes = frontier_figure(rows).subfigs[0].axes
    assert [axis.get_xlabel() for axis in axes] == ["forward passes per text (NFE)", "response tokens per second"]


def test_the_figure_names_experiments_where_there_are_several_and_tells_controls_apart():
    one = [record(0, 0.5), record(0, 0.6, nfe=2)]
    other = record(0, 0.9, experiment="two")
    other["rows"].append(other["rows"][1] | {"decoder": "marginals", "quality": {"validity": 0.1, "bleu": None}})
    found = {}
    for name, records in (("one", one), ("both", [*one, other])):
        axis = frontier_figure(frontier_rows(records)).subfigs[0].axes[0]
        found[name] = axis.get_legend_handles_labels()[1]
        levels = {line.get_label(): line.get_linestyle() for line in axis.lines if len(set(line.get_ydata())) == 1}
        axis.figure.canvas.draw()
        assert [tick.get_text() for tick in axis.get_xticklabels() if tick.get_text()][:1] != ["1.0"]
    assert set(found["one"]) == {"student", "floor"}
    assert set(found["both"]) >= {"student (one)", "student (two)", "marginals (two)"}
    assert levels["floor (one)"] == "--"
    assert levels["marginals (two)"] == ":"


def test_the_report_leaves_its_files(tmp_path, monkeypatch):
    """The page is made of the rows of the tables, which are gathered once."""
    monkeypatch.setattr("reporting.page.frontier_rows", None)
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "record.json").write_text(json.dumps(record(seed, 0.5)))
    console = Console(width=120, record=True)
    report_frontier(tmp_path, console)
    assert "student" in console.export_text()
    assert (tmp_path / "report" / "frontier.png").stat().st_size > 1000
    assert "± 0.000" in (tmp_path / "report" / "frontier.md").read_text()
    assert "student" in (tmp_path / "report" / "report.html").read_text()
    assert list((tmp_path / "report").glob("events*"))
