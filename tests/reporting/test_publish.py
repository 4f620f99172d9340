"""Tables of the documentation are what the kept records say."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from app.command_line import mistake_in, quoted
from models.functional.errors import UsageError
from reporting import publish
from reporting.gather import frontier_figure
from reporting.keys import FORMAT
from reporting.publish import DOCS, differing_pages, keep_records, main, with_tables, write_pages

COMMAND = "python run.py experiment=masked data.train=TRAIN"
PAGE = """# Page

<!-- results
name: masked
columns: [NFE, BLEU, slot acc.]
rows: {"teacher, greedy": random remasking, product of marginals: control}
-->
old figures
<!-- end of results -->

After it.
"""


def row(decoder, nfe, bleu, **more):
    quality = {"bleu": bleu, "slot_accuracy": None} | more
    known = {"method": "teacher", "decoder": decoder, "nfe": nfe, "quality": quality, "entropy": None, "distinct": None}
    return known | {"cost": {}, "n_samples": 8, "ci95": {"slot_accuracy": [0.25, 0.75]} if more else {}}


@pytest.fixture
def run(tmp_path):
    """A function that writes the record of a run and gives its folder."""

    def write(seed, rows, experiment="masked", commit="0123456789", corpus="pairs"):
        folder = tmp_path / f"{corpus}_{experiment}_{seed}"
        folder.mkdir(parents=True)
        record = {
            "format": FORMAT,
            "experiment": experiment,
            "commit": commit,
            "seed": seed,
            "device": "cpu, 1 threads",
        }
        record |= {"versions": {}, "config": {"path": "/home/me"}, "data": {"name": corpus}, "rows": rows}
        record |= {"texts": [{"decoder": "teacher, greedy", "prompt": "mine", "response": "mine", "fault": ""}]}
        (folder / "record.json").write_text(json.dumps(record))
        return folder

    return write


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "page.md").write_text(PAGE)
    return folder


def table_lines(docs):
    return [line for line in (docs / "page.md").read_text().splitlines() if line.startswith("|")]


def test_every_table_of_the_documentation_is_what_its_records_say():
    assert differing_pages(DOCS) == []


def test_published_commands_can_be_typed():
    """A shell gives run.py the words that were meant, and each option is one that there is."""
    records = [json.loads(path.read_text()) for path in DOCS.rglob("records/*/*.json")]
    published = {record["published"]["command"] for record in records if "benchmark" not in record}
    assert published
    for command in sorted(part for whole in published for part in whole.split(" && ")):
        words = shlex.split(command)
        typed = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
        assert typed.stdout.split("\0")[:-1] == words, command
        assert words[:2] == ["python", "run.py"]
        assert mistake_in(quoted(words[2:])) is None, command


def test_a_page_is_written_from_the_records_of_a_run(run, docs):
    rows = [row("product of marginals", 0, 1.23456789), row("teacher, greedy", 4, 20.0, slot_accuracy=0.5)]
    (kept,) = keep_records("masked", [run(0, [*rows, row("another", 1, 9.0)])], COMMAND, docs)
    assert "home" not in kept.read_text()
    assert json.loads(kept.read_text())["rows"][0]["quality"]["bleu"] == 1.23457
    assert write_pages(docs) == [docs / "page.md"]
    text = (docs / "page.md").read_text()
    assert f"· commit 0123456 · cpu, 1 threads · seed 0 · `{COMMAND}`\n" in text
    assert table_lines(docs) == [
        "| decoder | NFE | BLEU | slot acc. |",
        "| --- | ---: | ---: | ---: |",
        "| random remasking | 4 | 20.0 | 0.500 [0.250, 0.750] |",
        "| control | - | 1.2 | - |",
    ]
    assert text.startswith("# Page\n\n<!-- results\n")
    assert text.endswith("<!-- end of results -->\n\nAfter it.\n")
    assert write_pages(docs) == differing_pages(docs) == []


def test_seeds_become_a_mean_with_an_interval(run, docs):
    both = [("teacher, greedy", 4), ("product of marginals", 0)]
    runs = [run(seed, [row(name, nfe, bleu) for name, nfe in both]) for seed, bleu in ((0, 10.0), (1, 20.0))]
    keep_records("masked", runs, COMMAND, docs)
    write_pages(docs)
    # t of one degree of freedom: 12.706 * 7.071 / sqrt(2)
    assert table_lines(docs)[2] == "| random remasking | 4 | 15.0 ± 63.5 | - |"
    text = (docs / "page.md").read_text()
    assert "· seeds 0, 1 ·" in text
    assert "\n\nMean over seeds and 95 % interval of it.\n\n| decoder" in text


def test_seeds_of_different_commands_are_one_mean(run, docs):
    """A row whose texts have an interval of their own has that of the seeds."""
    for seed in (0, 1):
        rows = [row("teacher, greedy", 4, 1.0, slot_accuracy=seed / 2), row("product of marginals", 0, 1.0)]
        keep_records("masked", [run(seed, rows)], f"{COMMAND} seed={seed}", docs)
    write_pages(docs)
    text = (docs / "page.md").read_text()
    assert text.count("0.250 ± 3.177") == 1
    assert text.count("Mean over seeds and 95 % interval of it.") == 1
    assert [line.split(" · ")[3] for line in text.splitlines() if " · " in line] == ["seed 0", "seed 1"]


def test_experiments_are_compared_in_the_order_of_the_mark(run, docs):
    runs = [run(0, [row("teacher, greedy", 1.5, 3.0)], name) for name in ("all/first", "all/second")]
    assert [path.name for path in keep_records("two", runs, COMMAND, docs)] == [
        "pairs_all-first_0.json", "pairs_all-second_0.json",
    ]  # fmt: skip
    mark = "<!-- results\nname: two\ncolumns: [NFE]\nexperiments: {all/second: B, all/first: A}\n-->\n<!-- end of results -->\n"
    lines = [line for line in with_tables(mark, docs / "results" / "records").splitlines() if line.startswith("|")]
    assert lines[0] == "| experiment | decoder | NFE |"
    assert lines[2:] == ["| B | teacher, greedy | 1.5 |", "| A | teacher, greedy | 1.5 |"]


def test_the_rows_of_a_table_are_drawn_as_it_calls_them(run, docs, monkeypatch):
    """Where the table is new, or has changed; a page that is as it was keeps its figure."""
    drawn, panels = [], []

    def noted(rows, speed):
        drawn.append([(row.experiment, row.decoder) for row in rows])
        panels.append(len((made := frontier_figure(rows, speed=speed)).axes))
        return made

    monkeypatch.setattr(publish, "frontier_figure", noted)
    (docs / "page.md").write_text(PAGE.replace("name: masked", "name: masked\nfigure: masked.png"))
    rows = [row("product of marginals", 0, 1.0), row("teacher, greedy", 4, 20.0), row("another", 1, 9.0)]
    keep_records("masked", [run(0, rows)], COMMAND, docs)
    write_pages(docs)
    assert (docs / "masked.png").stat().st_size > 1000
    assert drawn == [[("masked", "random remasking"), ("masked", "control")]]
    write_pages(docs)
    assert len(drawn) == 1
    (docs / "masked.png").unlink()
    write_pages(docs)
    assert len(drawn) == 2
    keep_records("masked", [run(1, rows)], COMMAND, docs)
    write_pages(docs)
    assert len(drawn) == 3
    (docs / "page.md").write_text((docs / "page.md").read_text().replace("[NFE, BLEU", "[NFE, tokens/s, BLEU"))
    write_pages(docs)
    assert panels == [panels[0]] * 3 + [panels[0] + 1]
    assert differing_pages(docs) == []


def test_the_readme_beside_the_pages_is_written_too(run, docs):
    readme = docs.parent / "README.md"
    readme.write_text(PAGE)
    rows = [row("teacher, greedy", 4, 20.0), row("product of marginals", 0, 1.0)]
    keep_records("masked", [run(0, rows)], COMMAND, docs)
    assert write_pages(docs) == [readme, docs / "page.md"]
    assert "| random remasking | 4 | 20.0 | - |" in readme.read_text()
    readme.write_text(readme.read_text().replace("20.0", "21.0"))
    assert differing_pages(docs) == [readme]


def test_rows_of_the_named_numbers_of_passes_and_controls(run, docs):
    rows = [row("teacher, greedy", nfe, 10.0 * nfe) for nfe in (1, 2, 4)] + [row("product of marginals", 0, 1.0)]
    keep_records("masked", [run(0, rows)], COMMAND, docs)
    (docs / "page.md").write_text(PAGE.replace("name: masked", "name: masked\nnfe: [4, 1]"))
    write_pages(docs)
    assert table_lines(docs)[2:] == [
        "| random remasking | 1 | 10.0 | - |",
        "| random remasking | 4 | 40.0 | - |",
        "| control | - | 1.0 | - |",
    ]
    (docs / "page.md").write_text(PAGE.replace("name: masked", "name: masked\nnfe: [1, 3]"))
    with pytest.raises(UsageError, match="no row has nfe=3; known are 1, 2, 4"):
        write_pages(docs)


def test_decoders_are_drawn_against_tokens_per_forward_pass(run, docs):
    made = [row("teacher, greedy", nfe, 10.0 * nfe) | {"cost": {"tokens_per_forward": 8 / nfe}} for nfe in (1, 2)]
    (docs / "page.md").write_text(PAGE.replace("name: masked", "name: masked\ntpf_figure: tpf.png"))
    rows = [*made, row("product of marginals", 0, 1.0)]
    keep_records("masked", [run(0, rows)], COMMAND, docs)
    write_pages(docs)
    assert (docs / "tpf.png").stat().st_size > 1000
    assert not (docs / "masked.png").exists()
    (docs / "page.md").write_text((docs / "page.md").read_text().replace("masked\n", "one\n"))
    keep_records("one", [run(1, [rows[0], rows[2]])], COMMAND, docs)
    with pytest.raises(UsageError, match="no method has two decoders; leave tpf_figure: out"):
        write_pages(docs)


@pytest.fixture
def measured(tmp_path):
    """A function that writes a file as benchmarks do."""

    def write(commit="0123456789", name="decoding"):
        found = {"benchmark": name, "date": "2026-01-02", "command": f"python benchmarks/{name}.py --threads 1"}
        found |= {"options": {"clock": "cpu", "drafter": "/home/me/drafter"}, "device": "cpu, 1 threads", "threads": 1}
        found |= {"torch": "2", "commit": commit, "rows": [{"name": "ours", "ratio": {"median": 1.23456789}}]}
        rows = [["theirs", "1.0 [1.0, 1.0]", "7"], ["ours", "2.0 [1.9, 2.1]", "8"]]
        found |= {"reading": "so", "table": {"columns": ["decoder", "ratio", "ms"], "rows": rows}}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(found))
        return path

    return write


TIMES = "<!-- results\nname: times\n{}-->\n<!-- end of results -->\n"


def test_a_table_is_written_from_what_a_benchmark_printed(measured, docs, capsys):
    assert main(["--docs", str(docs), "add", "times", str(measured())]) == 0
    (kept,) = (docs / publish.RECORDS / "times").glob("*.json")
    assert "home" not in kept.read_text()
    assert json.loads(kept.read_text())["rows"][0]["ratio"]["median"] == 1.23457
    whole = with_tables(TIMES.format(""), docs / publish.RECORDS).splitlines()
    assert (
        "2026-01-02 · commit 0123456 · cpu, 1 threads · cpu clock · `python benchmarks/decoding.py --threads 1`"
        in whole
    )
    lines = [line for line in whole if line.startswith("|")]
    assert lines[0] == "| decoder | ratio | ms |"
    assert lines[2:] == ["| theirs | 1.0 [1.0, 1.0] | 7 |", "| ours | 2.0 [1.9, 2.1] | 8 |"]
    some = with_tables(TIMES.format("columns: [ms]\nrows: {ours: the student}\n"), docs / publish.RECORDS)
    assert [line for line in some.splitlines() if line.startswith("|")][2:] == ["| the student | 8 |"]


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("columns: [BLEU]\n", "no record has the column 'BLEU'; known are decoder, ms, ratio"),
        ("rows: {mine: a}\n", "no record has the row 'mine'; known are ours, theirs"),
    ],
)
def test_what_a_benchmark_has_not_printed_is_refused(measured, docs, mark, message):
    keep_records("times", [measured()], None, docs)
    with pytest.raises(UsageError, match=message):
        with_tables(TIMES.format(mark), docs / publish.RECORDS)


def test_benchmarks_of_uncommitted_files_or_several_in_one_table_are_refused(measured, run, docs):
    with pytest.raises(UsageError, match="no commit holds; commit them and run it again"):
        keep_records("times", [measured("012+changes")], None, docs)
    keep_records("times", [measured(), measured(name="other")], None, docs)
    with pytest.raises(UsageError, match="2 benchmarks are kept under this name"):
        with_tables(TIMES.format(""), docs / publish.RECORDS)
    with pytest.raises(UsageError, match="is of a run; type --command"):
        keep_records("masked", [run(0, [row("a", 1, 1.0)])], None, docs)


@pytest.mark.parametrize("gone", [*publish.MEASURED[1:], "date", "command", "options", "clock"])
def test_a_benchmark_of_an_earlier_version_is_measured_again(measured, docs, gone):
    path = measured()
    found = json.loads(path.read_text())
    del (found["options"] if gone == "clock" else found)[gone]
    path.write_text(json.dumps(found))
    with pytest.raises(UsageError, match=rf"earlier version, without {gone}; measure again with --json FILE"):
        keep_records("times", [path], None, docs)


def test_a_changed_figure_is_found(run, docs, capsys):
    keep_records(
        "masked", [run(0, [row("teacher, greedy", 4, 20.0), row("product of marginals", 0, 1.0)])], COMMAND, docs
    )
    options = ["--docs", str(docs)]
    assert main(options) == 0
    assert main([*options, "--check"]) == 0
    page = docs / "page.md"
    page.write_text(page.read_text().replace("20.0", "21.0"))
    capsys.readouterr()
    assert main([*options, "--check"]) == 1
    assert capsys.readouterr().out == f"{page} differs from its records; type python -m reporting.publish\n"
    assert "21.0" in page.read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "name: masked",
            "name: nothing",
            "no record is kept under this name; type python -m reporting.publish add nothing",
        ),
        ("[NFE, BLEU", "[NFE, BLUE", "no column is called BLUE; known are NFE, valid"),
        (
            "teacher, greedy",
            "teacher",
            "no record has the decoder 'teacher'; known are product of marginals, teacher, greedy",
        ),
        ("rows:", "row:", "the mark of a table cannot be read"),
        ("columns:", "heads:", "the mark of a table cannot be read"),
        ("rows: {", "rows: {[", "the mark of a table cannot be read"),
        ("name: masked", "name: masked\nfigure: ../a.png", "figure=../a.png is a path; type the name of a file"),
    ],
)
def test_a_mark_that_cannot_be_followed_is_told_why(run, docs, capsys, old, new, message):
    keep_records(
        "masked", [run(0, [row("teacher, greedy", 4, 20.0), row("product of marginals", 0, 1.0)])], COMMAND, docs
    )
    (docs / "page.md").write_text(PAGE.replace(old, new))
    assert main(["--docs", str(docs)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, "masked", "a"), (1, "masked", "b")], "its records are of a and b; keep a table for each"),
        ([(0, "masked", "a"), (0, "masked", "b")], "its records are of a and b; keep a table for each"),
        ([(0, "masked", "a"), (0, "other", "a")], "its records are of masked, other; name them with experiments:"),
    ],
)
def test_records_that_one_table_cannot_show_are_refused(run, docs, runs, message):
    rows = [row("teacher, greedy", 4, 1.0), row("product of marginals", 0, 1.0)]
    for seed, experiment, corpus in runs:
        keep_records("masked", [run(seed, rows, experiment, corpus=corpus)], COMMAND, docs)
    with pytest.raises(UsageError, match=message):
        write_pages(docs)


def test_a_row_that_some_seed_lacks_is_refused(run, docs):
    rows = [row("teacher, greedy", 4, 1.0), row("product of marginals", 0, 1.0)]
    keep_records("masked", [run(0, rows), run(1, rows[:1])], COMMAND, docs)
    with pytest.raises(UsageError, match="some of the 2 seeds have no 'product of marginals'"):
        write_pages(docs)


def test_a_figure_that_the_table_does_not_show_may_be_of_one_seed(run, docs):
    rows = [row("teacher, greedy", 4, 1.0), row("product of marginals", 0, 1.0)]
    more = [{**own, "cost": {"trained_weights": 3}} for own in rows]
    keep_records("masked", [run(0, more), run(1, rows)], COMMAND, docs)
    assert write_pages(docs)
    page = docs / "page.md"
    page.write_text(page.read_text().replace("columns: [", "columns: [trained weights, "))
    with pytest.raises(UsageError, match="or not all of its figures"):
        write_pages(docs)


def test_a_decoder_of_an_experiment_that_is_not_shown_is_unknown_and_so_is_its_command(run, docs):
    keep_records("two", [run(0, [row("a", 1, 1.0)], "first")], "python run.py experiment=first", docs)
    keep_records("two", [run(0, [row("b", 1, 1.0)], "second")], "python run.py experiment=second", docs)
    mark = "<!-- results\nname: two\ncolumns: [NFE]\nexperiments: {first: A}\nrows: {a: one}\n-->\n<!-- end of results -->\n"
    text = with_tables(mark, docs / "results" / "records")
    assert "second" not in text
    with pytest.raises(UsageError, match="no record has the decoder 'b'; known are a"):
        with_tables(mark.replace("{a: one}", "{b: one}"), docs / "results" / "records")


def test_a_table_without_its_end_is_refused_and_nothing_is_written(run, docs):
    keep_records(
        "masked", [run(0, [row("teacher, greedy", 4, 1.0), row("product of marginals", 0, 1.0)])], COMMAND, docs
    )
    broken = PAGE.replace("<!-- end of results -->", "") + "\n## Prose\n\n" + PAGE
    (docs / "page.md").write_text(broken)
    with pytest.raises(UsageError, match="does not end with <!-- end of results -->"):
        write_pages(docs)
    assert (docs / "page.md").read_text() == broken


def test_a_record_of_uncommitted_files_is_refused(run, docs):
    with pytest.raises(UsageError, match="no commit holds; commit them and run it again"):
        keep_records("masked", [run(0, [], commit="012+changes")], COMMAND, docs)
    assert not (docs / publish.RECORDS).exists()


def test_the_command_keeps_records(run, docs, capsys):
    folder = run(0, [row("teacher, greedy", 4, 20.0)])
    assert main(["--docs", str(docs), "add", "masked", str(folder), "--command", COMMAND]) == 0
    kept = Path(capsys.readouterr().out.removeprefix("kept ").strip())
    assert kept == docs / "results" / "records" / "masked" / "pairs_masked_0.json"
    assert "mine" not in kept.read_text()
    assert main(["--docs", str(docs), "add", "masked", str(docs), "--command", COMMAND]) == 2
    assert "record.json is not a readable record" in capsys.readouterr().err
