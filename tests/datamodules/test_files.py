import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from datamodules.files import read_pairs
from models.functional.errors import UsageError

ROWS = [{"q": "jump, twice", "a": "J J"}, {"q": 'say "hé"\nnow', "a": "3"}, {"q": "", "a": "W"}]


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def write_as(kind, folder):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, ROWS)
    if kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["q", "a"])
            writer.writeheader()
            writer.writerows(ROWS)
        return path
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return path
    plain = write_as(kind.removesuffix(".gz"), folder)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "jsonl.gz", "csv.gz"])
def test_all_formats_give_the_same_rows(kind, tmp_path):
    pairs = read_pairs(write_as(kind, tmp_path), "q", "a")
    assert pairs.prompts == [row["q"] for row in ROWS]
    assert pairs.responses == [row["a"] for row in ROWS]
    assert pairs.slots == [None] * 3
    assert pairs.problems == []


def test_bad_lines_are_named_by_number_and_the_others_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        b'\xef\xbb\xbf{"q": "one", "a": 1}',
        b"{broken",
        b'["a list"]',
        b'{"q": "\xff", "a": "x"}',
        b"",
        b'{"q": "no answer"}',
        b'{"q": null, "a": "x"}',
        b'{"q": "\\ud800", "a": "x"}',
        b'{"q": "a", "a": ["x"]}',
        b'{"q": "two", "a": true}\r',
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match=r"(?s)7 unusable lines.*rows\.jsonl:2: not JSON.*and 2 more"):
        pairs = read_pairs(path, "q", "a")
    assert (pairs.prompts, pairs.responses) == (["one", "two"], ["1", "True"])
    assert [int(problem.split(":")[1]) for problem in pairs.problems] == [2, 3, 4, 6, 7, 8, 9]
    reasons = ["not JSON (", "not a JSON object", "bad UTF-8", "no field 'a'", "no value", "not valid UTF-8", "list"]
    for problem, reason in zip(pairs.problems, reasons, strict=True):
        assert reason in problem


def test_bad_csv_lines_are_named_by_the_line_they_begin_on(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'q,a\n\n"one\nline",1\ntwo\nthree,3,3\n\xff,4\n"x"y,5\nfive,5\n')
    with pytest.warns(UserWarning, match="4 unusable lines"):
        pairs = read_pairs(path, "q", "a")
    assert pairs.prompts == ["one\nline", "five"]
    assert [int(problem.split(":")[1]) for problem in pairs.problems] == [5, 6, 7, 8]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_dictionary_prompts_become_text_and_keep_their_slots(kind, tmp_path):
    rows = [{"q": {"name": "The Vaults", "price": 30, "area": "city"}, "a": "x"}, {"q": {"name": "Aromi"}, "a": "y"}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    pairs = read_pairs(path, "q", "a")
    assert pairs.prompts == ["name[The Vaults], price[30], area[city]", "name[Aromi]"]
    assert pairs.slots == [{"name": "The Vaults", "price": "30", "area": "city"}, {"name": "Aromi"}]


NOT_FINITE = [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400"]


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_number_that_is_none_is_no_value(value, tmp_path):
    lines = [b'{"q": "one", "a": 1.5}', b'{"q": "two", "a": %s}', b'{"q": %s, "a": "x"}', b'{"q": {"s": %s}, "a": "x"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*(line.replace(b"%s", value) for line in lines), lines[0]]))
    with pytest.warns(UserWarning, match=r"3 unusable lines"):
        pairs = read_pairs(tmp_path / "a.jsonl", "q", "a")
    assert pairs.responses == ["1.5", "1.5"]
    assert [int(problem.split(":")[1]) for problem in pairs.problems] == [2, 3, 4]
    assert all("has no value (" in problem for problem in pairs.problems)


def test_nan_in_parquet_is_no_value_and_the_word_is_a_text(tmp_path):
    for kind in (pyarrow.float64(), pyarrow.float32(), pyarrow.float16()):
        values = pyarrow.array([1.0, float("nan"), float("-inf"), 3.0]).cast(kind, safe=False)
        pyarrow.parquet.write_table(pyarrow.table({"q": ["a", "b", "nan", "c"], "a": values}), tmp_path / "a.parquet")
        with pytest.warns(UserWarning, match=r"2 unusable lines.*\n.*a\.parquet:2: field 'a' has no value"):
            assert read_pairs(tmp_path / "a.parquet", "q", "a").responses == ["1.0", "3.0"]
    (tmp_path / "a.csv").write_text("q,a\nNaN,inf\n")
    assert read_pairs(tmp_path / "a.csv", "q", "a").responses == ["inf"]


@pytest.mark.parametrize("prompt", ['{"na\\ud83dme": "x"}', '{"name": "\\ud83d"}', '"\\udc00"'])
def test_a_lone_surrogate_is_a_bad_line_wherever_it_stands(prompt, tmp_path):
    good = '{"q": {"name": "x"}, "a": "1"}'
    (tmp_path / "a.jsonl").write_text("\n".join([good, f'{{"q": {prompt}, "a": "1"}}', good]))
    with pytest.warns(UserWarning, match=r"a\.jsonl:2: .* is not valid UTF-8"):
        pairs = read_pairs(tmp_path / "a.jsonl", "q", "a")
    assert pairs.slots == [{"name": "x"}] * 2
    (tmp_path / "b.jsonl").write_text('{"na\\ud83dme": "x"}')
    with pytest.raises(UsageError) as refused:
        read_pairs(tmp_path / "b.jsonl", "q", "a")
    str(refused.value).encode()


def test_a_field_that_stands_twice_is_a_bad_line(tmp_path):
    lines = ['{"q": "x", "a": "1"}', '{"q": "x", "a": "1", "a": "2"}', '{"q": {"s": "1", "s": "2"}, "a": "1"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match=r"(?s)jsonl:2: not JSON \(an object has the field 'a' twice.*field 's' twice"):
        assert len(read_pairs(tmp_path / "a.jsonl", "q", "a")) == 1


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table([["x"], ["y"], ["z"]], names=["q", "a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="two of its columns are named 'a'"):
        read_pairs(tmp_path / "a.parquet", "q", "a")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "jsonl.gz", "csv.gz"])
def test_an_extension_may_be_written_in_capitals(kind, tmp_path):
    path = write_as(kind, tmp_path)
    for name in (path.name.upper(), path.name.title()):
        path = path.rename(path.with_name(name))
        assert read_pairs(path, "q", "a").prompts == [row["q"] for row in ROWS]


@pytest.mark.parametrize("folder", ["run[1]", "a*b", "what?", "[!x]", "run[1]/deep[2]"])
def test_what_exists_is_no_glob(folder, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir(parents=True)
    for name in ("x[0]", "y"):
        write_jsonl(tmp_path / folder / f"{name}.jsonl", [{"q": name, "a": "1"}])
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, tmp_path.relative_to(tmp_path)):
        assert read_pairs(root / folder / "x[0].jsonl", "q", "a").prompts == ["x[0]"]
        assert read_pairs(str(root / folder / "*.jsonl"), "q", "a").prompts == ["x[0]", "y"]
        assert read_pairs(str(root / folder / "[xy].jsonl"), "q", "a").prompts == ["y"]


def test_globs_and_lists_are_read_in_order(tmp_path, monkeypatch):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"part-{name}.jsonl", [{"q": name, "a": name}])
    monkeypatch.chdir(tmp_path)
    assert read_pairs("part-*.jsonl", "q", "a").prompts == ["a", "b", "c"]
    assert read_pairs(["part-c.jsonl", "part-[ab].jsonl"], "q", "a").prompts == ["c", "a", "b"]


def test_what_cannot_be_read_at_all_is_named(tmp_path):
    def refuses(path, message, fields=("q", "a")):
        with pytest.raises(UsageError, match=message):
            read_pairs(path, *fields, option="data.val")

    good = write_jsonl(tmp_path / "good.jsonl", [{"q": "x", "a": "y", "z": 1}])
    refuses(tmp_path / "none.jsonl", r"data\.val=.*none\.jsonl does not exist")
    refuses(tmp_path / "no*.jsonl", "does not exist")
    refuses(tmp_path, r"is a folder; type data\.val='.*/\*\.jsonl'")
    refuses([], "names no file")
    refuses(good, r"has no field 'input'; type data\.prompt_field=NAME .*: q, a, z", ("input", "a"))
    refuses(good, r"has no field 'out'; type data\.response_field=NAME .*: q, a, z", ("q", "out"))

    (tmp_path / "empty.jsonl").write_text("\n")
    refuses(tmp_path / "empty.jsonl", "is empty")
    (tmp_path / "header.csv").write_text("q,a\n")
    refuses(tmp_path / "header.csv", "is empty")
    (tmp_path / "rows.txt").write_text("x")
    refuses(tmp_path / "rows.txt", "unknown extension")
    (tmp_path / "bad.jsonl").write_text("x\ny\n")
    refuses(tmp_path / "bad.jsonl", r"(?s)no usable line among 2.*bad\.jsonl:1: not JSON.*bad\.jsonl:2")
    (tmp_path / "bad.parquet").write_text("x")
    refuses(tmp_path / "bad.parquet", "cannot be read")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"q": "x", "a": "y"}\n' * 99)[:-10])
    refuses(tmp_path / "cut.jsonl.gz", "cannot be read")


def test_a_hub_name_is_loaded_with_its_split(monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{**row, "extra": 1} for row in ROWS])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_pairs("hub:some/name:test[:10]", "q", "a").prompts == [row["q"] for row in ROWS]
    assert len(read_pairs(["hub:other"], "q", "a")) == 3
    assert asked == [("some/name", "test[:10]"), ("other", "train")]
    with pytest.raises(UsageError, match="its fields: q, a, extra"):
        read_pairs("hub:other", "q", "b")


def test_without_network_a_hub_name_says_what_to_do(monkeypatch):
    def load(name, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UsageError, match=r"(?s)data\.train=hub:some/name could not be loaded.*no route.*download"):
        read_pairs("hub:some/name", "q", "a")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (json.dumps(ROWS[0], indent=1), r"goes on in the next line; `jq -c \. FILE"),
        (json.dumps(ROWS, indent=1), r"goes on in the next line; `jq -c '\.\[\]' FILE"),
        (json.dumps(ROWS), r"not a JSON object; `jq -c '\.\[\]' FILE"),
        (json.dumps(ROWS[0]) + ",\n", "a comma follows"),
        ('["one", "two"]\n', r'not a JSON object; a line must be \{"q": \.\.\., "a": \.\.\.\}$'),
        ("[]\n7\n", r'2: not a JSON object; a line must be \{"q": '),
    ],
)
def test_json_of_another_layout_is_answered_with_how_to_convert_it(text, advice, tmp_path):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UsageError, match=advice):
        read_pairs(tmp_path / "a.jsonl", "q", "a")


def test_a_zipped_file_is_unzipped_for_jq(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROWS))
    with pytest.raises(UsageError, match=r"`gzip -dc FILE \| jq -c '\.\[\]' > NEW`"):
        read_pairs(tmp_path / "a.jsonl.gz", "q", "a")


@pytest.mark.parametrize(
    ("name", "data", "converts"),
    [
        ("UTF-8.jsonl", b"7\n", False),
        ("a.jsonl", b'{"q": "\\ud83d", "a": "x"}\n', False),  # half of a character, in a file of UTF-8
        ("a.jsonl", b'{"q": "\xe9", "a": "x"}\n', True),
        ("a.csv", b"q,a\n\xe9,x\n", True),
    ],
)
def test_only_another_encoding_is_answered_with_iconv(name, data, converts, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError) as refused:
        read_pairs(tmp_path / name, "q", "a")
    assert ("iconv" in str(refused.value)) == converts
