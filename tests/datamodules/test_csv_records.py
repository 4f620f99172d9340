"""A csv cell stays one cell, whatever it holds and however long it is."""

import csv
import gzip
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules import csv_records
from datamodules.documents import DocumentReader, Problems
from datamodules.files import read_pairs
from models.functional.errors import UsageError

LONG = "\n".join(f'Line {k} of the one "long" article; it has many, many lines' for k in range(4000))
CELLS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('",;\t|\n\r'), max_size=20)
# quotes even in number that do not stand where csv has them
BROKEN = ['"x"y,5', '"say "hello, you" twice",5', '"a\n"b" c\nd",5', '"x" "y",5']


def written(rows, delimiter=",", end="\r\n") -> str:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, lineterminator=end).writerows(rows)
    return file.getvalue()


def records(text: str, delimiter=",") -> list:
    return [cells for _, cells in csv_records.csv_records(io.StringIO(text, newline=""), delimiter)]


def documents(path, problems=None) -> list[str]:
    return [passage.text for passage in DocumentReader().read(path, "data.train", problems) if passage.opens]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_a_cell_of_many_lines_and_characters_is_one_document(name, tmp_path):
    texts = [f"Small {k}." for k in range(30)] + [LONG, "between", LONG[::-1]] + [f"Late {k}." for k in range(30)]
    data, problems = written([["text"], *([text] for text in texts)]).encode(), Problems()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert len(LONG) > 200_000
    assert documents(tmp_path / name, problems) == texts
    assert problems.count == 0


def test_a_long_cell_is_one_answer(tmp_path):
    (tmp_path / "a.csv").write_text(written([["q", "a"], ["one", LONG], [LONG, "two"]]), newline="")
    pairs = read_pairs(tmp_path / "a.csv", "q", "a")
    assert (pairs.prompts, pairs.responses) == (["one", LONG], [LONG, "two"])


@given(st.lists(st.lists(CELLS, min_size=2, max_size=4), max_size=8), st.sampled_from(csv_records.DELIMITERS))
def test_what_was_written_is_read(rows, delimiter):
    assert records(written(rows, delimiter), delimiter) == rows


@given(
    st.lists(st.tuples(CELLS, CELLS).map(list), max_size=4),
    st.sampled_from(BROKEN),
    st.lists(st.tuples(CELLS, CELLS).map(list), max_size=4),
)
def test_a_broken_record_spoils_itself_alone(before, broken, after):
    found = records(written(before) + broken + "\r\n" + written(after))
    assert found[: len(before)] == before
    assert isinstance(found[len(before)], str)
    assert found[len(before) + 1 :] == after


def test_records_are_named_by_the_line_they_begin_on():
    text = 'q,a\n\n"one\ntwo",1\n"x\n"y" z\n",2\nlast,3\n'
    found = list(csv_records.csv_records(io.StringIO(text, newline="")))
    assert [line for line, _ in found] == [1, 3, 5, 8]
    assert "lines 5 to 7 are left out" in found[2][1]
    assert found[3][1] == ["last", "3"]


def test_an_odd_quote_costs_its_own_line_where_no_other_one_follows():
    assert records('q,a\n"x"y"z,5\nsix,6\n"seven, 7",7\n')[2:] == [["six", "6"], ["seven, 7", "7"]]
    assert records('q,a\n5" pipe,5\nsix,6\n') == [["q", "a"], ['5" pipe', "5"], ["six", "6"]]


def test_a_quote_that_is_never_closed_says_what_is_lost():
    *_, last = records('q,a\none,1\n"two,2\nthree,3\n')
    assert last == "not csv (a quote is opened and never closed; the 1 lines after it are lost with it)"


def test_a_cell_too_long_to_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_records, "LONGEST_CELL", 1000)
    (tmp_path / "a.csv").write_text('text\nfirst\n"' + "never closed\n" * 99)
    with pytest.raises(UsageError, match=r"a\.csv cannot be read \(a cell of more than 1,000 .* record of line 3"):
        documents(tmp_path / "a.csv")


# -- what separates cells ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
@given(st.lists(st.tuples(CELLS.filter(bool), CELLS).map(list), min_size=1, max_size=4))
def test_the_header_tells_the_delimiter(tmp_path_factory, delimiter, rows):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text(written([["question", "answer"], *rows], delimiter), newline="")
    with pytest.warns(UserWarning, match="its header is separated by"):
        pairs = read_pairs(path, "question", "answer")
    assert [list(pair) for pair in zip(pairs.prompts, pairs.responses, strict=True)] == rows


def test_a_comma_is_kept_where_the_header_has_the_fields(tmp_path, recwarn):
    (tmp_path / "a.csv").write_text("q;x,a|y\none,1\n")
    assert read_pairs(tmp_path / "a.csv", "q;x", "a|y").prompts == ["one"]
    assert not recwarn.list


def test_a_wrong_field_lists_the_columns_of_the_delimiter_found(tmp_path):
    (tmp_path / "a.csv").write_text("question; answer\nx;y\n")
    with (
        pytest.warns(UserWarning, match="';'"),
        pytest.raises(UsageError, match=r"its fields: question, ' answer' \(' answer' differs only in spaces"),
    ):
        read_pairs(tmp_path / "a.csv", "question", "answer")


@pytest.mark.parametrize("header", ["q,a,a", "q,q,a", "x,q,a,x"])
def test_two_columns_of_one_name_are_refused(header, tmp_path):
    (tmp_path / "a.csv").write_text(f"{header}\n{header}\n")
    with pytest.raises(UsageError, match=r"two of its columns are named '[qax]'; rename one of them"):
        read_pairs(tmp_path / "a.csv", "q", "a")


def test_columns_without_a_name_do_no_harm(tmp_path):
    (tmp_path / "a.csv").write_text("q,a,,\none,1,,\n")
    assert read_pairs(tmp_path / "a.csv", "q", "a").responses == ["1"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", ":", "^"])
@pytest.mark.parametrize("first", ["sep={}", "sep={} ", '"sep={}"', "\ufeffsep={}"])
def test_the_delimiter_that_excel_declares_counts(tmp_path, delimiter, first, recwarn):
    rows = [["q", "a"], ["one", 'two, "three"; four'], ["five"], ["six", "seven"]]
    text = first.format(delimiter) + "\r\n" + written(rows, delimiter)
    (tmp_path / "a.csv").write_text(text, newline="", encoding="utf-8")
    pairs = read_pairs(tmp_path / "a.csv", "q", "a")
    assert list(zip(pairs.prompts, pairs.responses, strict=True)) == [("one", 'two, "three"; four'), ("six", "seven")]
    assert pairs.problems == [f"{tmp_path}/a.csv:4: 1 cells, but the header has 2"]
    assert not any("is separated by" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("column", ["sep", "sep=", "sep==x", "sepia"])
def test_a_column_may_be_called_almost_so(tmp_path, column):
    (tmp_path / "a.csv").write_text(f"{column},a\n1,2\n")
    assert read_pairs(tmp_path / "a.csv", column, "a").responses == ["2"]


def test_what_stands_above_the_header_is_shown_as_what_it_was_taken_for(tmp_path):
    (tmp_path / "a.csv").write_text("1,2\nq,a\n1,2\n")
    with pytest.raises(UsageError, match=r"fields: 1, 2; the first line of a csv file holds their names"):
        read_pairs(tmp_path / "a.csv", "q", "a")
    (tmp_path / "a.csv").write_text("# made by hand\nq,a\n1,2\n")
    with pytest.raises(UsageError, match=r"2 cells, but the header has 1 \('# made by hand'\)"):
        read_pairs(tmp_path / "a.csv", "q", "a")
