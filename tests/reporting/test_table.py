"""The table of a record shows its numbers, the most important columns first."""

import io

import pytest
from rich.console import Console

from reporting.table import COLUMNS, MOST_COLUMNS, markdown_table, results_table, split_rows


def cells(table) -> dict[str, list[str]]:
    return {str(column.header): list(column.cells) for column in table.columns}


def markdown_cells(record) -> dict[str, list[str]]:
    header, rule, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown_table(record).splitlines()
    ]
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    assert len(rule) == len(header)
    return {name: [line[k] for line in lines] for k, name in enumerate(header)}


def test_columns_exist_only_where_the_record_has_values(oracle_record, pairs_record):
    assert list(markdown_cells(pairs_record)) == [
        *("decoder", "NFE", "exact match", "slot acc.", "BLEU", "tokens/s", "distinct", "MFLOP/token")
    ]
    assert markdown_cells(oracle_record)["TV"] == ["0.42"] * 5
    for known in oracle_record["rows"]:
        known["quality"]["tv"] = None
    assert "TV" not in markdown_cells(oracle_record)
    oracle_record["rows"][2]["quality"]["tv"] = 0.25
    assert markdown_cells(oracle_record)["TV"] == ["-", "-", "0.25", "-", "-"]


def test_numbers_are_written_as_their_column_says(oracle_record):
    table = markdown_cells(oracle_record)
    assert table["decoder"][:3] == ["teacher, sampled", "teacher, sampled", "student, greedy"]
    assert table["NFE"] == ["1", "16", "1", "-", "-"]
    assert table["valid"] == ["0.100", "0.900", "0.750", "0.125", "1.000"]
    assert table["valid, part prompted"] == ["0.050", "0.450", "0.375", "0.062", "0.500"]
    assert table["exact match"][2] == "0.375"
    assert table["NLL of valid"][2] == "3.21"
    assert table["entropy"] == ["5.10", "5.20", "0.00", "6.00", "5.60"]  # a zero is a value
    assert table["distinct"][2] == "0.25"
    assert table["tokens/s"] == ["1,234", "1,234", "1,234", "-", "-"]
    assert table["MFLOP/token"] == ["3.40", "3.40", "3.40", "-", "-"]


def test_a_terminal_shows_eight_columns_the_most_important_first(oracle_record):
    everything = markdown_cells(oracle_record)
    shown = cells(results_table(oracle_record, 300))
    assert MOST_COLUMNS == 8
    assert list(shown) == list(everything)[:8]
    assert list(shown) == ["decoder", "NFE", "valid", "exact match", "entropy", "valid, no prompt", "TV", "coverage"]
    assert all(column == everything[name] for name, column in shown.items())


def test_the_line_below_says_what_the_shown_columns_are(oracle_record):
    caption = results_table(oracle_record, 300).caption
    assert caption.startswith("NFE: number of function evaluations, the forward passes for one text; ")
    assert "TV: total variation distance" in caption
    assert "PPL" not in caption
    model = oracle_record | {
        "rows": [oracle_record["rows"][0] | {"method": "model", "nfe": 0, "quality": {"nll": 1.0}}]
    }
    table = results_table(model)
    assert list(cells(table)) == ["model", "entropy", "tokens/s", "distinct", "MFLOP/token", "NLL"]
    assert "NFE" not in table.caption


def test_a_narrow_terminal_shows_fewer_columns_and_cuts_no_number(oracle_record):
    everything = cells(results_table(oracle_record, 300))
    before = len(everything)
    for width in range(120, 59, -1):
        table = results_table(oracle_record, width)
        left = cells(table)
        assert list(left) == list(everything)[: len(left)]
        assert len(left) <= before
        before = len(left)
        out = io.StringIO()
        Console(width=width, file=out).print(table)
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        body = lines[next(n for n, line in enumerate(lines) if "───" in line) :]
        assert not any("…" in line for line in body), width
        for name, column in left.items():
            assert column == everything[name]
    assert 3 <= before < 8


@pytest.mark.parametrize("name", ["title", "name"])
def test_no_two_columns_are_called_alike(name):
    found = [getattr(column, name) for column in COLUMNS]
    assert len(set(found)) == len(found)


def test_models_have_a_table_of_their_own(oracle_record):
    oracle_record["rows"].append(oracle_record["rows"][0] | {"method": "model"})
    assert [len(part["rows"]) for part in split_rows(oracle_record)] == [5, 1]
