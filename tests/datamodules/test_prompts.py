"""Prompts are what was typed: a line of a file each, or the characters after prompt=."""

import codecs
import json
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datamodules.prompts import has_rows, read_prompt_rows, read_prompts
from models.functional.errors import UsageError

LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0")).filter(str.strip)
ODD = ["a\u2028b", "a\x0cb", "a\x0bb", "a\x85b", "a\rb", " a ", "a\ufeffb", "a\0b"]


@pytest.fixture
def prompts_of(tmp_path):
    def read(data: bytes, n=1):
        (tmp_path / "p.txt").write_bytes(data)
        return read_prompts(None, str(tmp_path / "p.txt"), n)

    return read


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_prompt_is_a_line_and_a_line_ends_with_a_newline(prompts_of, end, mark):
    assert prompts_of(mark + end.join(ODD).encode()) == ODD
    assert prompts_of(mark + (end.join(ODD) + end).encode()) == ODD


@example(lines=["\r0"], n=1)
@given(lines=st.lists(LINES.filter(lambda line: not line.endswith("\r")), min_size=1, max_size=5), n=st.integers(1, 3))
def test_every_line_comes_back_n_times(lines, n, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_bytes(
        codecs.BOM_UTF8 + ("\n".join(lines) + "\n").encode()
    )  # a file without any \n may end lines with \r
    assert read_prompts(None, str(path), n) == [line for line in lines for _ in range(n)]


def test_blank_lines_are_skipped_and_counted_in_one_line(prompts_of, capsys):
    assert prompts_of(b"\none\n\n \t\r\ntwo\n\n") == ["one", "two"]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.endswith("p.txt: 4 blank lines are skipped")
    assert prompts_of(b"one\ntwo\n") == ["one", "two"]
    assert not capsys.readouterr().out


def test_a_file_that_holds_no_prompt_is_named(prompts_of):
    for data in (b"", b"\n", b" \n\n", codecs.BOM_UTF8):
        with pytest.raises(UsageError, match=r"prompt_file=.*p\.txt is empty"):
            prompts_of(data)
    with pytest.raises(UsageError, match="not text in UTF-8"):
        prompts_of(b"a\xff")
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        with pytest.raises(UsageError, match=r"prompt_file=.*p\.txt cannot be read \(it is text in UTF-"):
            prompts_of("two words\n".encode(encoding))
    with pytest.raises(UsageError, match="does not exist"):
        read_prompts(None, "nowhere.txt", 1)
    with pytest.raises(UsageError, match="n=0 must be at least 1"):
        read_prompts("a", None, 0)


@pytest.mark.parametrize(("given", "text"), [(None, ""), ("", ""), ("a", "a"), (0, "0"), (0.5, "0.5")])
def test_a_prompt_of_any_type_is_a_text(given, text):
    assert read_prompts(given, None, 2) == [text, text]
    with pytest.raises(UsageError, match="prompt= is not valid UTF-8"):
        read_prompts("a\ud800", None, 1)


def test_in_a_file_without_newlines_carriage_returns_end_a_prompt(prompts_of):
    assert prompts_of(b"one two\rthree\r") == ["one two", "three"]
    assert prompts_of(b"one\rtwo\n") == ["one\rtwo"]


def test_prompts_come_from_a_pipe():
    out, into = os.pipe()
    os.write(into, b"one\ntwo\n")
    os.close(into)
    assert read_prompts(None, f"/dev/fd/{out}", 1) == ["one", "two"]
    os.close(out)


def test_what_would_be_passed_over_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("one\n")
    for prompt in ("a", "", 0):
        with pytest.raises(UsageError, match=r"prompt= and prompt_file=.*p\.txt are both given"):
            read_prompts(prompt, str(tmp_path / "p.txt"), 1)
    with pytest.raises(UsageError, match="is a folder"):
        read_prompts(None, str(tmp_path), 1)
    (tmp_path / "p.txt").write_bytes("déjà".encode("latin-1"))
    with pytest.raises(UsageError, match=r"not text in UTF-8.*iconv -f windows-1252"):
        read_prompts(None, str(tmp_path / "p.txt"), 1)


def test_the_different_prompts_of_rows_are_taken_in_their_order(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"slots": {"name": "B", "area": "any"}},
        {"slots": "plain"},
        {"slots": {"name": "B", "area": "any"}},
        {"slots": []},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert has_rows(str(path))
    assert not has_rows("prompts.txt")
    assert not has_rows(None)
    assert read_prompt_rows(str(path), "slots") == {"name[B], area[any]": rows[0]["slots"], "plain": "plain"}
    assert "1 rows without a prompt are left out" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"has no field 'input'; type data.prompt_field=NAME"):
        read_prompt_rows(str(path), "input")
    with pytest.raises(UsageError, match="does not exist"):
        read_prompt_rows("nowhere.jsonl", "slots")
    path.write_text(json.dumps({"slots": []}))
    with pytest.raises(UsageError, match="has no prompt in its field slots"):
        read_prompt_rows(str(path), "slots")
