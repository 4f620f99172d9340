"""The table and the sentences of a record say its numbers."""

import io

from rich.console import Console

from reporting.table import COLUMNS, DISPENSABLE, in_words, markdown_table, results_table

# -- table and words -------------------------------------------------------------------------------------------------


def cells(table) -> dict[str, list[str]]:
    return {str(column.header): list(column.cells) for column in table.columns}


def heading(title: str) -> str:
    return title.replace("|", " ")


def test_columns_exist_only_where_the_record_has_values(oracle_record, pairs_record):
    assert list(cells(results_table(pairs_record, 300))) == [
        *("decoder", "forwards", "exact match", "slot acc.", "BLEU", "distinct", "tokens/s", "MFLOP/token")
    ]
    everything = cells(results_table(oracle_record, 300))
    assert set(everything) == {"decoder", "forwards"} | {
        heading(t) for t in COLUMNS if t not in ("BLEU", "self-BLEU", "slot acc.")
    }
    assert everything["TV"] == ["0.42"] * 5
    for known in oracle_record["rows"]:
        known["quality"]["tv"] = None
    assert "TV" not in cells(results_table(oracle_record, 300))
    oracle_record["rows"][2]["quality"]["tv"] = 0.25
    assert cells(results_table(oracle_record, 300))["TV"] == ["-", "-", "0.25", "-", "-"]


def test_numbers_are_written_as_their_column_says(oracle_record):
    table = cells(results_table(oracle_record, 300))
    assert table["decoder"][:3] == ["teacher, sampled", "teacher, sampled", "student, greedy"]
    assert table["forwards"] == ["1", "16", "1", "-", "-"]
    assert table["valid"] == ["0.100", "0.900", "0.750", "0.125", "1.000"]
    assert table["valid part"] == ["0.050", "0.450", "0.375", "0.062", "0.500"]
    assert table["exact match"][2] == "0.375"
    assert table["NLL of valid"][2] == "3.21"
    assert table["entropy"] == ["5.10", "5.20", "0.00", "6.00", "5.60"]  # a zero is a value
    assert table["distinct"][2] == "0.25"
    assert table["tokens/s"] == ["1,234", "1,234", "1,234", "-", "-"]
    assert table["MFLOP/token"] == ["3.40", "3.40", "3.40", "-", "-"]


def test_a_narrow_terminal_drops_dispensable_columns_in_their_order_and_cuts_no_number(oracle_record):
    everything = cells(results_table(oracle_record, 300))
    dispensable = [heading(title) for title in DISPENSABLE]
    dropped_before: set[str] = set()
    for width in range(160, 79, -1):
        table = results_table(oracle_record, width)
        left = cells(table)
        dropped = set(everything) - set(left)
        assert dropped == set(dispensable[: len(dropped)])
        assert dropped >= dropped_before
        dropped_before = dropped
        out = io.StringIO()
        Console(width=width, file=out).print(table)
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        body = lines[next(n for n, line in enumerate(lines) if "───" in line) :]
        assert not any("…" in line for line in body), width
        for name, column in left.items():
            assert column == everything[name]
    assert dropped_before == set(dispensable)
    assert set(everything) - dropped_before >= {"decoder", "forwards", "valid", "exact match", "entropy", "tokens/s"}


def test_markdown_has_the_same_numbers(oracle_record, pairs_record):
    for record in (oracle_record, pairs_record):
        header, rule, *lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in markdown_table(record).splitlines()
        ]
        assert all(set(cell) <= {"-", ":"} for cell in rule)
        assert len(rule) == len(header)
        by_name = {name: [line[k] for line in lines] for k, name in enumerate(header)}
        assert by_name == cells(results_table(record, 300))


def test_words_give_the_factorisation_bound_with_the_records_own_total_correlation(oracle_record, pairs_record):
    (bound,) = [s for s in in_words(oracle_record) if "total correlation" in s]
    assert "2.35 nats (total correlation)" in bound
    assert "KL 2.35, which the product of marginals reaches" in bound
    oracle_record["data"]["conditional_total_correlation"] = 0.5
    (bound,) = [s for s in in_words(oracle_record) if "total correlation" in s]
    assert "KL 0.50" in bound
    assert not [s for s in in_words(pairs_record) if "correlation" in s or "marginals" in s]


def test_words_about_the_student_use_the_rows_own_numbers(oracle_record):
    (student,) = [s for s in in_words(oracle_record) if "with the whole plan prompted" in s]
    assert student.startswith("student, greedy, 1 forward: 75")
    assert "37.5 % with part of it (product of marginals 6.2 %)" in student
    assert "without a prompt it says one text" in student  # its unprompted texts have entropy 0
    for row in oracle_record["rows"]:
        row["entropy"] = 1.0
    (student,) = [s for s in in_words(oracle_record) if "with the whole plan prompted" in s]
    assert "0.25 of its unprompted texts are distinct" in student
    (truth,) = [s for s in in_words(oracle_record) if s.startswith("Truth")]
    assert "entropy 5.67 nats" in truth


def test_words_do_without_unprompted_texts(oracle_record):
    """Where every prompt shows something, nothing is known of entropy, coverage or distinct texts."""
    for known in oracle_record["rows"]:
        known |= {"entropy": None, "distinct": None}
        known["quality"] |= {"validity_none": None, "entropy_truth": None, "coverage": None, "tv": None}
    sentences = in_words(oracle_record)
    assert [s for s in sentences if "37.5 % with part of it" in s]
    assert not [s for s in sentences if "None" in s]


def test_the_judges_figures_are_said_beside_entropy(pairs_record):
    assert not [s for s in in_words(pairs_record) if s.startswith("Judge")]
    for k, row in enumerate(pairs_record["rows"]):
        row["quality"] |= {"judge_perplexity": 20.0 + k, "text_entropy": 3.5}
    (sentence,) = [s for s in in_words(pairs_record) if s.startswith("Judge")]
    one = [row["decoder"] for row in pairs_record["rows"] if row["forwards"] == 1]
    assert all(f"{decoder}, 1 forward: 2" in sentence for decoder in one)
    assert sentence.count("at 3.50") == len(one)
    assert "judge perplexity" in cells(results_table(pairs_record, 300))
