"""Documents of every kind of file, and a sentence for everything that cannot be read."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from datamodules import documents
from datamodules.documents import DocumentReader, Problems
from models.functional.errors import UsageError

TEXTS = ["jump, twice", "say hé\n\nnow 日本", " 3 "]


def read(source, problems=None, meter=lambda read: None, **options):
    """The documents, put together from their passages."""
    texts = []
    for passage in DocumentReader(**options).read(source, "data.train", problems, meter):
        texts.append(passage.text) if passage.opens else texts.append(texts.pop() + passage.text)
    return texts


def write(path, data: str | bytes):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def jsonl(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_all_formats_give_the_same_documents(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "other": [1, 2, 3]}), tmp_path / "rows.parquet")
    hub = datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {"some/name": hub}[name])
    sources = [
        write(tmp_path / "rows.jsonl", jsonl(TEXTS)),
        write(tmp_path / "rows.jsonl.gz", gzip.compress(jsonl(TEXTS).encode())),
        tmp_path / "rows.parquet",
        "hub:some/name:train",
        [write(tmp_path / f"part-{k}.txt", text) for k, text in enumerate(TEXTS)],
        str(tmp_path / "part-*.txt"),
        write(tmp_path / "all.txt.gz", gzip.compress("<|endoftext|>\n".join(TEXTS).encode())),
    ]
    for source in sources:
        assert read(source, cut="separator" if "all" in str(source) else "file") == TEXTS


@pytest.mark.parametrize(
    ("cut", "found"),
    [
        ("file", ["a\nb\r\n\n \nc|d\n|\n\ne"]),
        ("line", ["a", "b", "c|d", "|", "e"]),
        ("blank_line", ["a\nb", "c|d\n|", "e"]),
        ("separator", ["a\nb\r\n\n \nc", "d", "e"]),
    ],
)
def test_a_text_file_is_cut_where_the_option_says(cut, found, tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffa\nb\r\n\n \nc|d\n|\n\ne")
    assert read(path, cut=cut, separator="|") == found


def test_documents_are_named_by_the_line_they_begin_on(tmp_path):
    path = write(tmp_path / "a.txt", "a\nb\n\n\nc\n\nd")
    locations = [passage.location for passage in DocumentReader(cut="blank_line").read(path, "data.train")]
    assert [int(location.split(":")[-1]) for location in locations] == [1, 5, 7]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("unit", ["abc é日\n", "abc é日 "])
def test_a_long_document_comes_in_passages_that_lose_nothing(name, unit, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PASSAGE", 64)
    text = unit * 100
    path = write(tmp_path / name, text if name == "a.txt" else jsonl([text]))
    passages = list(DocumentReader().read(path, "data.train"))
    assert "".join(passage.text for passage in passages) == text
    assert [passage.opens for passage in passages] == [True] + [False] * (len(passages) - 1)
    assert 5 < len(passages) < 40
    assert max(len(passage.text) for passage in passages) <= 64
    if unit.endswith("\n"):
        assert all(passage.text.endswith("\n") for passage in passages)


def test_a_document_too_long_to_hold_is_refused_with_another_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 100)
    path = write(tmp_path / "a.txt", "x\n" * 100)
    with pytest.raises(UsageError, match=r"from line 1 on; type data\.cut=file"):
        read(path, cut="blank_line")
    assert len(read(path, cut="line")) == 100
    with pytest.raises(UsageError, match=r"more than 100 characters"):
        read(write(tmp_path / "b.txt", "y" * 101), cut="line")


def test_a_separator_is_found_wherever_a_very_long_line_is_read_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 20)
    texts = [f"{k}" * 7 for k in range(9)]
    path = write(tmp_path / "a.txt", "<end>".join(texts))
    assert read(path, cut="separator", separator="<end>") == texts


# -- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["file", "line", "blank_line", "separator"])
def test_a_line_of_bad_bytes_is_left_out_counted_and_named(cut, tmp_path):
    problems = Problems()
    path = write(tmp_path / "a.txt", b"good\nb\xffd\nlast \xc3\xa9\ncut \xc3")
    texts = read(path, problems, cut=cut)
    assert "".join(texts).replace("\n", "") == "goodlast é"
    assert problems.count == 2
    assert problems.first == [f"{path}:2: bad UTF-8 at byte 2", f"{path}:4: bad UTF-8 at byte 5"]


def test_a_line_that_is_left_out_still_ends_its_document(tmp_path):
    path = write(tmp_path / "a.txt", b"one\nb\xffd|\xff|two\n|three\nb\xffd\nthree")
    assert read(path, cut="separator", separator="|") == ["one", "three\nthree"]
    path = write(tmp_path / "b.txt", b"one\n\xff|two\n")
    assert read(path, cut="separator", separator="|") == ["one"]


def test_bad_rows_and_empty_ones_are_counted_and_named(tmp_path):
    problems = Problems()
    lines = [b'{"text": "a"}', b"{broken", b'{"text": "\xff"}', b'{"text": ""}', b'{"other": 1}', b'{"text": null}']
    path = write(tmp_path / "a.jsonl", b"\n".join([*lines, b'{"text": ["x"]}', b'{"text": "b"}']))
    assert read([path, write(tmp_path / "none.txt", ""), write(tmp_path / "b.jsonl", "")], problems) == ["a", "b"]
    assert problems.count == 8
    assert len(problems.first) == 5
    assert [int(problem.split(":")[1]) for problem in problems.first] == [2, 3, 4, 5, 6]
    assert "and 3 more" in str(problems)
    for cut in ("line", "blank_line", "separator", "file"):
        read(tmp_path / "none.txt", problems, cut=cut)
        assert problems.count == 9
        problems.count = 8


def test_what_cannot_be_read_at_all_is_named(tmp_path):
    def refuses(source, message, **options):
        with pytest.raises(UsageError, match=message):
            read(source, **options)

    refuses(tmp_path / "none.txt", r"data\.train=.*none\.txt does not exist")
    refuses(tmp_path, "is a folder")
    refuses(write(tmp_path / "a.doc", "x"), r"unknown extension; it must be a \.txt")
    rows = write(tmp_path / "a.jsonl", jsonl(["x"]))
    refuses(rows, r"has no field 'body'; type data\.text_field=NAME .*: text", text_field="body")
    refuses(write(tmp_path / "long.jsonl", jsonl(["x"]) * 5000), "has no field 'body'", text_field="body")
    refuses(write(tmp_path / "cut.txt.gz", gzip.compress(b"x" * 9999)[:-10]), r"cut\.txt\.gz cannot be read")
    refuses(rows, r"data\.cut=word is not known; type one of file, line, blank_line, separator", cut="word")
    refuses(rows, r"data\.separator='a\\nb' must be some characters of one line", separator="a\nb")


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl"])
def test_a_vanished_file_is_named(name, tmp_path):
    write(tmp_path / "a.txt", "first")
    write(tmp_path / name, "second")
    passages = DocumentReader().read(str(tmp_path / "*.*"), "data.train")
    assert next(passages).text == "first"
    (tmp_path / name).unlink()
    with pytest.raises(UsageError, match=rf"{name} cannot be read \(.*No such file"):
        next(passages)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt", "csv", "parquet"])
def test_the_meter_counts_the_bytes_on_disk(kind, tmp_path):
    path, seen = tmp_path / f"a.{kind}", []
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 99] * 1000}), path)
    else:
        text = "text\n" + "x\n" * 999 if kind == "csv" else jsonl(["x"] * 999)
        write(path, gzip.compress(text.encode()) if kind.endswith("gz") else text)
    read(path, meter=seen.append)
    assert sum(seen) == pytest.approx(path.stat().st_size)


@pytest.mark.parametrize("cut", ["line", "blank_line"])
def test_a_file_of_carriage_returns_alone_is_refused(tmp_path, cut):
    """It would be one line, and one document."""
    path = write(tmp_path / "a.txt", "one\r\rtwo\r\r")
    with pytest.raises(UsageError, match=r"a\.txt cannot be read \(its lines end in carriage returns alone.*`tr "):
        read(path, cut=cut)
    assert read(path, cut="file") == ["one\r\rtwo\r\r"]
    assert read(write(tmp_path / "b.txt", "one\r\n\r\ntwo\r\n"), cut=cut) == ["one", "two"]
    assert read(write(tmp_path / "c.txt", "one\rtwo"), cut=cut) == ["one\rtwo"]
