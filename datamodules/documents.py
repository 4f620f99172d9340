"""The documents of a corpus as a stream of passages, from text files and from the rows of other files.

A line that cannot be read is left out, counted and named. Legend: a document is the text between two `<bos>`; a passage is a
part of one, short enough to be tokenised at once.
"""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from datamodules.sources import (
    ROW_EXTENSIONS,
    SHOWN_PROBLEMS,
    LocatedRow,
    Meter,
    Source,
    first_few,
    hub_rows,
    is_hub,
    listed,
    no_meter,
    no_such_field,
    open_bytes,
    read_rows,
    readable,
    suffix_of,
    text_of,
)
from models.functional.errors import UsageError, require_choice

EXTENSIONS = f".txt, .txt.gz, {ROW_EXTENSIONS}"
CUTS = ("file", "line", "blank_line", "separator")

# Characters (bytes, where a file is read) of a passage: what bounds the memory that tokenising a long document takes.
PASSAGE = 2**18
# Characters of a document that is held in memory until its end is found.
LONGEST_DOCUMENT = 2**28
# A field that none of so many rows has is a wrong name, not a gap.
ROWS_WITHOUT_FIELD = 1000


class Passage(NamedTuple):
    """location: "file:line" of the document's beginning; opens: whether the document begins here."""

    location: str
    text: str
    opens: bool


@dataclass
class Problems:
    """What could not be used: how often, and the first few cases."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, location: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append(f"{location}: {reason}")

    def __str__(self) -> str:
        return first_few(self.first, self.count)


@dataclass(frozen=True)
class DocumentReader:
    """How documents are found in files; the options are those of `conf/data/packed_text.yaml`.

    text_field: the field of jsonl, csv, parquet and hub rows, each of which is a document.
    cut: where a document of a text file ends: with the file, each line, at blank lines, or at `separator`, which is no
        part of the text. Line ends around such a document are removed, and where nothing is left there is no document.
    """

    text_field: str = "text"
    cut: str = "file"
    separator: str = "<|endoftext|>"

    def __post_init__(self) -> None:
        require_choice("data.cut", self.cut, CUTS)
        if not self.separator or "\n" in self.separator or "\r" in self.separator:
            raise UsageError(
                f"data.separator={self.separator!r} must be some characters of one line; "
                "type data.separator='<|endoftext|>', or data.cut=blank_line"
            )

    def read(
        self, source: Source, option: str, problems: Problems | None = None, meter: Meter = no_meter
    ) -> Iterator[Passage]:
        """The passages of all documents in the order of the files.

        source: a file, a glob, `hub:NAME` or `hub:NAME:SPLIT`, or a list of these. meter: called with how many bytes were read.

        Raises UsageError when a file does not exist, vanishes, has an unknown extension or no such field.
        """
        problems = Problems() if problems is None else problems
        for item in listed(source, option, EXTENSIONS):
            path = Path(item)
            if is_hub(item):
                rows = hub_rows(str(item), [self.text_field], option, meter)
                yield from self._of_rows(rows, f"{option}={item}", problems)
            elif suffix_of(path) in (".txt", ".txt.gz"):
                with readable(path, option):
                    yield from self._of_text_file(path, option, problems, meter)
            else:
                rows = read_rows(path, [self.text_field], option, meter, EXTENSIONS)
                yield from self._of_rows(rows, f"{option}: {path}", problems)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _of_rows(self, rows: Iterable[LocatedRow], where: str, problems: Problems) -> Iterator[Passage]:
        fields: dict[str, None] = {}
        number = 0
        for number, (location, row) in enumerate(rows, start=1):
            if isinstance(row, str):
                problems.add(location, row)
            else:
                fields.update(dict.fromkeys(row))
                try:
                    text = text_of(row, self.text_field)
                except ValueError as error:
                    problems.add(location, str(error))
                else:
                    yield from _passages(location, text, problems)
            if number == ROWS_WITHOUT_FIELD and fields and self.text_field not in fields:
                break
        if fields and self.text_field not in fields:
            raise no_such_field(where, "text_field", self.text_field, fields)
        if number == 0:
            problems.add(where, "the file is empty")

    # -- text files ---------------------------------------------------------------------------------------------------

    def _of_text_file(self, path: Path, option: str, problems: Problems, meter: Meter) -> Iterator[Passage]:
        if self.cut == "file":
            yield from _whole_file(path, problems, meter)
            return
        if self.cut in ("line", "blank_line"):
            _require_line_ends(path)
        found, left_out = False, problems.count
        mark = self.separator if self.cut == "separator" else ""
        lines = _lines(path, LONGEST_DOCUMENT, problems, meter, mark)
        for line, text in self._documents(path, option, lines):
            text = text.strip("\r\n")
            if text.strip():
                found = True
                yield from _passages(f"{path}:{line}", text, problems)
        if not found and problems.count == left_out:
            problems.add(str(path), "the file is empty")

    def _documents(self, path: Path, option: str, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """(number of its first line, text) of each document."""
        first, held, size = 1, [], 0
        for number, line in lines:
            if held and not held[-1].endswith("\n"):
                size -= len(held[-1])
                line = held.pop() + line  # the next part of a very long line
            *ended, rest = self._parts(line)
            for part in ended:
                yield first if held else number, "".join([*held, part])
                held, size = [], 0
            if held or rest.strip("\r\n"):
                first = first if held else number
                held.append(rest)
                size += len(rest)
            if size > LONGEST_DOCUMENT:
                raise UsageError(
                    f"{option}: {path} has a document of more than {LONGEST_DOCUMENT:,} characters from line {first} on; "
                    f"type data.cut=file to read it part by part, or another data.cut (now {self.cut})"
                )
        yield first, "".join(held)

    def _parts(self, line: str) -> list[str]:
        """The parts of a line that end a document, then the one with which the next begins."""
        if self.cut == "separator":
            return line.split(self.separator)
        ends = line.endswith("\n") and (self.cut == "line" or not line.strip())
        return [line, ""] if ends else [line]


def _require_line_ends(path: Path) -> None:
    """Raise OSError for a file whose lines end in carriage returns alone: all of it would be one line."""
    with open_bytes(path) as file:
        start = file.peek()
    if start.count(b"\r") > 1 and b"\n" not in start:
        raise OSError(
            "its lines end in carriage returns alone; convert it with `tr '\\r' '\\n' < FILE > NEW`, or type data.cut=file"
        )


def _whole_file(path: Path, problems: Problems, meter: Meter) -> Iterator[Passage]:
    held, size, opens, left_out = [], 0, True, problems.count
    for _, line in _lines(path, PASSAGE, problems, meter):
        if held and size + len(line) > PASSAGE:
            yield Passage(f"{path}:1", "".join(held), opens)
            held, size, opens = [], 0, False
        held.append(line)
        size += len(line)
    if size:
        yield Passage(f"{path}:1", "".join(held), opens)
    elif opens and problems.count == left_out:
        problems.add(str(path), "the file is empty")


def _lines(path: Path, limit: int, problems: Problems, meter: Meter, mark: str = "") -> Iterator[tuple[int, str]]:
    """(number, text with its end) of each line; one of more than `limit` bytes comes in parts.

    mark: what remains of a line that is left out, as often as the line has it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_bytes(path, meter) as file:
        number, passed, first = 1, 0, True
        while part := file.readline(limit):
            if first:
                part, first = part.removeprefix(codecs.BOM_UTF8), False
            ended = part.endswith(b"\n") or len(part) < limit
            try:
                text = decoder.decode(part, final=ended)
            except UnicodeDecodeError as error:
                problems.add(f"{path}:{number}", f"bad UTF-8 at byte {passed + error.start + 1}")
                decoder.reset()
                text = mark * part.count(mark.encode()) if mark else ""
            if text:
                yield number, text
            number, passed = (number + 1, 0) if ended else (number, passed + len(part))


def _passages(location: str, text: str, problems: Problems) -> Iterator[Passage]:
    """A document in parts that end with a line wherever a line ends in time."""
    if not text:
        problems.add(location, "the document is empty")
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > PASSAGE:
            end = text.rfind("\n", start, start + PASSAGE) + 1
            end = end if end > start else start + PASSAGE
        yield Passage(location, text[start:end], start == 0)
        start = end
