"""The records of a csv file: a cell may be long, span many lines and hold quotes, and stays one cell."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

DELIMITERS = (",", ";", "\t", "|")
# Characters of a cell. One that is longer is more likely a quote that is never closed.
LONGEST_CELL = 2**28
# Characters that are read to find the end of a record with a misplaced quote.
SEARCHED = 2**20


def csv_records(lines: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, list[str] | str]]:
    """(line that it begins on, its cells, or why there are none) of each record; blank lines are none.

    lines: with their ends. A record with a misplaced quote ends where its quotes are even in number, or with the line of
    the fault where they never are. So the lines of a cell are not taken for records.

    Raises OSError for a cell of more than LONGEST_CELL characters.
    """
    source = _Lines(lines)
    # one setting for the whole process, 131,072 characters by default
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        first = source.begin_record()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field larger than" in str(error):
                raise OSError(
                    f"a cell of more than {LONGEST_CELL:,} characters begins in the record of line {first}; "
                    "its quote may never be closed"
                ) from error
            if source.ended:
                lost = source.number - first
                yield first, f"not csv (a quote is opened and never closed; the {lost} lines after it are lost with it)"
                return
            source.skip_to_even_quotes()
            several = f"; lines {first} to {source.number} are left out" if source.number > first else ""
            yield first, f"not csv ({error}{several})"
            continue
        if cells:
            yield first, cells


def declared_delimiter(text: TextIO) -> str | None:
    """The delimiter that the first line declares as Excel writes and reads it (`sep=;`); None where it declares none."""
    found = re.fullmatch(r'"?sep=(.)"?\s*', text.readline(12))
    return None if found is None else found[1]


def find_delimiter(open_text: Callable[[], TextIO], fields: Sequence[str]) -> str:
    """The delimiter with which the header has all `fields`, else that with which it has most cells; the comma where two do."""
    headers = {}
    for delimiter in DELIMITERS:
        with open_text() as text:
            cells = next((cells for _, cells in csv_records(text, delimiter)), [])
        headers[delimiter] = [] if isinstance(cells, str) else cells
    return max(DELIMITERS, key=lambda each: (set(fields) <= set(headers[each]), len(headers[each])))


class _Lines:
    """Lines of text as an iterator that remembers those of the current record, and can give lines a second time."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._again: list[str] = []  # the next line last
        self._record: list[str] = []
        self.number = 0  # of the line given last
        self.ended = False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self._again:
            line = self._again.pop()
        else:
            try:
                line = next(self._lines)
            except StopIteration:
                self.ended = True
                raise
        self.number += 1
        self._record.append(line)
        return line

    def begin_record(self) -> int:
        """The number of the line that comes next."""
        self._record = []
        return self.number + 1

    def skip_to_even_quotes(self) -> None:
        """Leave out what belongs to a record whose lines so far have an odd number of quotes; nothing where none ends it."""
        quotes, known, size = sum(line.count('"') for line in self._record), len(self._record), 0
        while quotes % 2 and size < SEARCHED:
            try:
                line = next(self)
            except StopIteration:
                break
            quotes, size = quotes + line.count('"'), size + len(line)
        if quotes % 2:
            self.number -= len(self._record) - known
            self._again += reversed(self._record[known:])
            self.ended = False
