"""Text that is not in UTF-8 is refused with how to convert it, and text in UTF-8 never is."""

import bz2
import gzip
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.documents import DocumentReader, Problems
from datamodules.files import read_pairs
from datamodules.text_encoding import require_utf8
from models.functional.errors import UsageError

WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
TEXTS = {
    "English": "The red boat left.\n",
    "French": "Où est-il passé, déjà ?\r\n",
    "Russian": "Привет мир. Это тест.\n",
    "Chinese": "你好 世界\n这是 一个 测试\n",
    "Japanese": "日本語のテキスト\nテスト\n",
    "emoji": "👩‍👩‍👧 and 🦘\n",
}


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("times", [1, 500])
def test_utf_16_and_32_are_told_by_their_first_bytes(encoding, language, times):
    data = (TEXTS[language] * times).encode(encoding)
    for start in (data, data[:4096], data[: min(len(data), 4095)]):
        with pytest.raises(OSError, match=rf"text in {encoding[:6].upper()}.*iconv -f UTF-{encoding[4:6]}"):
            require_utf8(start)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_every_reader_of_text_refuses_them(name, encoding, tmp_path):
    text = json.dumps({"text": "a b"}) if "jsonl" in name else "text\na b\n"
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(UsageError, match=rf"data\.train: .*{name} cannot be read \(it is text in UTF-"):
        list(DocumentReader().read(tmp_path / name, "data.train"))
    if "txt" not in name:
        with pytest.raises(UsageError, match=r"data\.val: .*only UTF-8 is read"):
            read_pairs(tmp_path / name, "text", "text", option="data.val")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_utf_8_is_never_refused(text):
    require_utf8(text.encode())
    require_utf8(text.encode("utf-8-sig"))
    require_utf8(text.encode()[:-1])


@pytest.mark.parametrize("text", ["", "x", "a\0b", "name\0other name\0third\0", "tab\tand\r\n\x00 é\0\0"])
def test_a_nul_in_utf_8_is_text(text):
    require_utf8(text.encode())
    require_utf8(text.encode() + b"\xff")


@pytest.mark.parametrize("text", ["PAR1,dose\nx,é\n", "PAR1 is a gene", "%PDF- begins a PDF"])
def test_text_that_begins_as_other_files_do_is_read(text):
    require_utf8(text.encode())
    for more in (b"\0", b"\xff"):
        with pytest.raises(OSError, match=r"it is a (parquet file|PDF), not text"):
            require_utf8(text.encode() + more)


OTHER_KINDS = {
    "gzip data": gzip.compress(b"text"),
    "parquet": b"PAR1\x15\x04\0",
    "zip archive": b"PK\x03\x04\x14\0",
    "bzip2": bz2.compress(b"text"),
    "xz": lzma.compress(b"text"),
    "zstd": b"\x28\xb5\x2f\xfd\x04",
    "7z": b"7z\xbc\xaf\x27\x1c",
    "Arrow": b"ARROW1\0\0",
    "SQLite": b"SQLite format 3\0",
    "a PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_file_that_is_no_text_is_called_what_it_is(name, kind, tmp_path):
    """Of a zipped file, what it holds."""
    data = OTHER_KINDS[kind]
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(UsageError, match=rf"data\.train: .*{name} cannot be read \(it is .*{kind}.*, not text; \w+"):
        list(DocumentReader(cut="line").read(tmp_path / name, "data.train"))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "gb18030", "shift_jis", "koi8-r", "cp037"])
@pytest.mark.parametrize("cut", ["file", "line"])
def test_bad_lines_of_another_encoding_are_answered_with_how_to_convert_it(encoding, cut, tmp_path):
    languages = {"gb18030": "你好", "shift_jis": "テスト", "koi8-r": "Привет"}
    data = f"{languages.get(encoding, 'déjà vu')}\n".encode(encoding) * 9
    (tmp_path / "a.txt").write_bytes(data)
    problems = Problems()
    assert list(DocumentReader(cut=cut).read(tmp_path / "a.txt", "data.train", problems)) == []
    assert "a.txt:1: bad UTF-8 at byte" in str(problems)
    assert str(problems).endswith("such as `iconv -f windows-1252 -t UTF-8 FILE > NEW`")
    assert "is empty" not in str(problems)  # it is not
    assert "iconv" not in str(Problems(1, ["a.txt: the file is empty"]))
