"""report.html: well-formed, complete, nothing of a record is markup, nothing is loaded."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from helpers.record import make_record, quality, row
from rich.console import Console

from reporting.page import Axis, report_page
from reporting.report import report_frontier

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "</script><b onclick='x'>&\" <img src=https://example.org/x>"


class Page(HTMLParser):
    """Tags must nest. texts: what is shown, by tag; attributes: every (tag, name, value)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.shown: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.shown.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[str]:
        return [text for own, text in self.shown if own == tag]

    def values(self, name: str) -> list[str]:
        return [value for _, own, value in self.attributes if own == name]


def with_texts(record: dict, *responses: str, prompt: str = "say") -> dict:
    texts = [
        {"decoder": f"{r['decoder']}, NFE {r['nfe']}", "prompt": prompt, "response": text, "fault": ""}
        for r in record["rows"]
        for text in responses
    ]
    return record | {"texts": texts}


def test_every_decoder_of_every_record_is_in_tables_and_charts(oracle_record, pairs_record):
    pairs_record["data"]["name"] = "pairs"
    page = Page(report_page([oracle_record, pairs_record]))
    assert page.all("h2") == ["corpus", "pairs"]
    cells, tips = page.all("td"), " ".join(page.values("data-tip"))
    for known in oracle_record["rows"] + pairs_record["rows"]:
        assert known["decoder"] in cells
        assert known["decoder"] in tips
    assert page.all("figcaption")[:3] == ["valid", "validity, no prompt", "TV, lower is better"] or page.all(
        "figcaption"
    )
    circles = [a for a in page.attributes if a[:2] == ("circle", "cx")]
    charts = len(page.all("figcaption"))
    assert charts >= 4
    assert len(circles) >= 3 * charts - 1  # of each decoder with forward passes; one figure is null


def test_a_chart_has_the_values_at_their_places():
    rows = [row("teacher", "t", nfe, quality(validity=v)) for nfe, v in ((1, 0.0), (4, 0.5), (16, 1.0))]
    page = Page(report_page([make_record([*rows, row("control", "floor", 0, quality(validity=0.25))])]))
    x, y = ([float(v) for tag, n, v in page.attributes if tag == "circle" and n == name] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1])  # a factor of four each
    assert x[0] < x[1]
    assert y[0] > y[1] > y[2]  # upwards
    assert y[0] - y[1] == pytest.approx(y[1] - y[2])
    (dashed,) = [v for tag, n, v in page.attributes if tag == "line" and n == "data-tip"]
    assert dashed.startswith("floor\ntrial\nvalid 0.250")
    level = [float(v) for tag, n, v in page.attributes if tag == "line" and n == "y1"]
    assert any(v == pytest.approx((y[0] + y[1]) / 2, abs=0.06) for v in level)
    assert "t\ntrial\nvalid 0.500\nNFE 4\n1 seed" in page.values("data-tip")


def test_ticks_lie_on_the_axis():
    assert Axis(1, 16, 0, 100, log=True).ticks() == [1, 2, 4, 8, 16]
    assert Axis(5.5, 5.75, 0, 100, log=True).ticks() == [5.5, 5.75]
    assert Axis(3.0, 3.0, 0, 100, log=True)(3.0) == 50
    assert Axis(0.0, 1.0, 240, 10).ticks() == [0, 0.25, 0.5, 0.75, 1]
    assert len(Axis(1, 2.0**20, 0, 100, log=True).ticks()) <= 8


def test_numbers_of_a_table_are_there_for_sorting(pairs_record):
    text = report_page([pairs_record])
    assert "<td data-value='0.375'>0.375</td>" in text
    assert "<td data-value='1234.5'>1,234</td>" in text
    assert "<td data-value=''>-</td>" in text  # not measured


def test_seeds_are_one_row_with_an_interval(pairs_record):
    changed = json.loads(json.dumps(pairs_record)) | {"seed": 4, "commit": "1234567890+changes"}
    for known in changed["rows"]:
        known["quality"]["exact_match"] += 0.1
    text = report_page([pairs_record, changed])
    assert text.count("<td>student, greedy</td>") == 1
    assert "0.425 ± 0.635" in text
    assert "seeds 3, 4 · commit abc, 1234567+changes · cpu" in text


def test_texts_stand_side_by_side_by_prompt_and_decoder(pairs_record):
    record = with_texts(pairs_record, "first", "second")
    for number, text in enumerate(record["texts"]):
        text["prompt"] = f"prompt {number % 2}"
        text["response"] += f" of {text['decoder']}"
    record["texts"][3]["fault"] = "a wrong word"
    text = report_page([record])
    page = Page(text)
    assert page.all("h3") == ["Texts of trial, seed 3"]
    heads = [head for head in page.all("th") if "NFE" in head or head == "prompt"]
    assert heads == ["prompt", "teacher, greedy, NFE 1", "teacher, greedy, NFE 8", "student, greedy, NFE 1"]
    second = text.split("prompt 1</th>")[1].split("</tr>")[0]
    assert Page(f"<i>{second}</i>").all("td") == [f"second of {head}" for head in heads[1:]]
    assert page.all("div").count("a wrong word") == 1


def test_a_text_stands_at_its_own_prompt_also_where_decoders_have_unlike_ones(pairs_record):
    texts = [("a", "p", "x"), ("a", "q", "y"), ("b", "q", "z")]
    record = pairs_record | {
        "texts": [dict(zip(("decoder", "prompt", "response"), text, strict=True)) for text in texts]
    }
    lines = [line.split("</tr>")[0] for line in report_page([record]).split("<th scope='row'>")[1:]]
    assert lines == ["p</th><td>x</td><td></td>", "q</th><td>y</td><td>z</td>"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "0.0"])
def test_figures_that_are_no_numbers_are_left_out(tmp_path, value):
    rows = [row("student", "s", 1, quality(validity=0.5)), row("student", "t", 2, quality(validity=0.25))]
    rows[0]["quality"]["judge_perplexity"] = rows[1]["quality"]["validity"] = "HERE"
    for number, seed in enumerate((1, None)):
        (tmp_path / f"run{number}").mkdir()
        text = json.dumps(make_record(rows) | {"seed": seed}).replace('"HERE"', value)
        (tmp_path / f"run{number}" / "record.json").write_text(text)
    report_frontier(tmp_path, Console(quiet=True))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "nan" not in page.split("<h1>")[1]
    assert "inf" not in page.split("<h1>")[1]


def test_the_newest_run_of_an_experiment_shows_its_texts(pairs_record):
    newer = with_texts(pairs_record | {"seed": 9}, "newer")
    text = report_page([with_texts(pairs_record, "older"), newer])
    assert "newer" in text
    assert "older" not in text


def test_nothing_of_a_record_is_markup(tmp_path):
    """Names and texts of a hostile record are shown as they are; half a surrogate pair, which no file holds, is replaced."""
    rows = [row("student", HOSTILE, 1, quality(validity=0.5)), row("control", HOSTILE + "2", 0, quality(validity=0.1))]
    record = with_texts(make_record(rows), HOSTILE, "\ud800" + HOSTILE, prompt=HOSTILE)
    record["data"]["name"] = record["experiment"] = record["commit"] = record["device"] = HOSTILE
    for text in record["texts"]:
        text["fault"] = HOSTILE
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    report_frontier(tmp_path, Console(quiet=True))
    plain = report_page([make_record([row("student", "s", 1, quality(validity=0.5))])])
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("h2") == [HOSTILE]
    assert {HOSTILE, "?" + HOSTILE} <= set(page.all("td"))
    assert HOSTILE in page.all("div")
    assert text.count("<script") == text.count("</script") == plain.count("<script")
    assert not [a for a in page.attributes if a[0] in ("b", "img") and a[1] != "class"]
    assert not page.values("onclick")
    assert not page.values("src")


def test_nothing_is_loaded(oracle_record):
    text = report_page([oracle_record])
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|//\w|\bsrc=|\bhref=|url\(|@import|\bimport\b|fetch\(|XMLHttp", text)


def test_runs_without_a_quality_have_tables_alone(tmp_path):
    (tmp_path / "run").mkdir()
    record = make_record([row("model", "NextToken", 0, {"nll": 0.75})])
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    report_frontier(tmp_path, Console(quiet=True))
    text = (tmp_path / "report" / "report.html").read_text()
    assert not list((tmp_path / "report").glob("*.png"))
    assert "<svg" not in text
    assert "NLL of the test texts: 0.750 nats a token." in text
    assert {"NextToken", "0.7500"} <= set(Page(text).all("td"))


SORT = """
const rows = %s;
const {compare} = (new Function(process.argv[1] + "; return {compare};"))();
console.log(JSON.stringify(rows.map(([values, sign]) => [...values].sort((a, b) => compare(a, b, sign)))));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_heads_sort_by_value_with_the_unmeasured_last(oracle_record):
    script = report_page([oracle_record])
    function = re.search(r"function compare\(.*?\n}\n", script, re.DOTALL)[0]
    cases = [[["10.0", "", "9.5", "-1.0"], -1], [["10.0", "", "9.5", "-1.0"], 1], [["b", "a", "c"], 1]]
    done = subprocess.run(
        ["node", "-e", SORT % json.dumps(cases), function], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == [["10.0", "9.5", "-1.0", ""], ["-1.0", "9.5", "10.0", ""], ["a", "b", "c"]]
