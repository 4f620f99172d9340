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
    published = {json.loads(path.read_text())["published"]["command"] for path in DOCS.rglob("records/*/*.json")}
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
