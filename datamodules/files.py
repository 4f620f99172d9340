"""Prompt -> response pairs from jsonl, csv and parquet files, or from a data set of the Hugging Face hub.

A line that cannot be used is skipped, counted and named; a file that cannot be used at all is a UsageError.
"""

import csv
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from models.functional.errors import UsageError

EXTENSIONS = ".jsonl, .jsonl.gz, .csv, .csv.gz or .parquet"
SHOWN_PROBLEMS = 5

Source = str | os.PathLike | Iterable[str | os.PathLike]
# A row read, or the reason why it could not be, with the place it stands at ("file:line").
PlacedRow = tuple[str, dict[str, Any] | str]


@dataclass
class Pairs:
    """N pairs in file order.

    slots: for a prompt that was a dictionary in the file, its {slot: value} as text; None for a prompt that was text.
    problems: "file:line: reason" for each line that was skipped.
    """

    prompts: list[str] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    slots: list[dict[str, str] | None] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def add(self, prompt: str, response: str, slots: dict[str, str] | None) -> None:
        self.prompts.append(prompt)
        self.responses.append(response)
        self.slots.append(slots)

    def take(self, indices: Iterable[int]) -> "Pairs":
        """The chosen pairs, without the problems (they belong to the files, not to a part of them)."""
        chosen = Pairs()
        for i in indices:
            chosen.add(self.prompts[i], self.responses[i], self.slots[i])
        return chosen


def read_pairs(source: Source, prompt_field: str, response_field: str, *, option: str = "data.train") -> Pairs:
    """Read the two fields of every row of a source.

    source: a file, a glob, `hub:NAME` or `hub:NAME:SPLIT` (split "train" unless given), or a list of these; relative
        paths start at the current directory. jsonl and csv may be gzipped (.gz).
    prompt_field, response_field: text, number or truth value; a prompt may also be a dictionary of these, which is
        written out as "name[The Vaults], eatType[pub]".
    option: how the user named the source, for messages.

    Warns with the first few unusable lines. Raises UsageError when a file does not exist, has an unknown extension, is
    empty, has no such field, or has not a single usable line.
    """
    pairs = Pairs()
    for item in [source] if isinstance(source, str | os.PathLike) else source:
        if str(item).startswith("hub:"):
            rows = _hub_rows(str(item), (prompt_field, response_field), option)
            _collect(rows, f"{option}={item}", prompt_field, response_field, pairs)
            continue
        for path in _files(item, option):
            rows = _rows(path, (prompt_field, response_field), option)
            _collect(rows, f"{option}: {path}", prompt_field, response_field, pairs)
    if not pairs.prompts:
        raise UsageError(f"{option} names no file; type {option}=FILE.jsonl")
    if pairs.problems:
        rank_zero_warn(f"{option}: {len(pairs.problems)} unusable lines were skipped:\n{_first_few(pairs.problems)}")
    return pairs


# -- from rows to pairs ----------------------------------------------------------------------------------------------


def _collect(rows: Iterable[PlacedRow], where: str, prompt_field: str, response_field: str, pairs: Pairs) -> None:
    fields: dict[str, None] = {}
    problems: list[str] = []
    before = len(pairs)
    for place, row in rows:
        if isinstance(row, str):
            problems.append(f"{place}: {row}")
            continue
        fields.update(dict.fromkeys(row))
        try:
            prompt, slots = _prompt(row, prompt_field)
            pairs.add(prompt, _text(row, response_field), slots)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    for option, name in (("prompt_field", prompt_field), ("response_field", response_field)):
        if fields and name not in fields:
            choices = ", ".join(map(str, fields))
            raise UsageError(
                f"{where} has no field {name!r}; type data.{option}=NAME with one of its fields: {choices}"
            )
    if len(pairs) == before:
        if not problems:
            raise UsageError(f"{where} is empty; name a file with at least one row")
        raise UsageError(f"{where} has no usable line among {len(problems)}:\n{_first_few(problems)}")
    pairs.problems.extend(problems)


def _prompt(row: dict[str, Any], name: str) -> tuple[str, dict[str, str] | None]:
    value = row.get(name)
    if not isinstance(value, dict):
        return _text(row, name), None
    # Parquet gives every row all slots and marks the absent ones with None.
    slots = {str(slot): _text(value, slot) for slot in value if value[slot] is not None}
    return ", ".join(f"{slot}[{text}]" for slot, text in slots.items()), slots


def _text(row: dict[str, Any], name: str) -> str:
    """The field as text; ValueError with the reason when it has none."""
    if name not in row:
        raise ValueError(f"no field {name!r}")
    value = row[name]
    if value is None:
        raise ValueError(f"field {name!r} has no value")
    if isinstance(value, dict | list | bytes):
        raise ValueError(f"field {name!r} holds {type(value).__name__}, not text")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {name!r} is not valid UTF-8") from error
    return text


def _first_few(problems: list[str]) -> str:
    more = len(problems) - SHOWN_PROBLEMS
    return "\n".join(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]) + (f"\n  and {more} more" * (more > 0))


# -- from files to rows ----------------------------------------------------------------------------------------------


def _files(item: str | os.PathLike, option: str) -> list[Path]:
    path = Path(item).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise UsageError(f"{option}={item} is a folder; type {option}='{item}/*.jsonl'")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not found:
        raise UsageError(
            f"{option}={item} does not exist (looked for {path.absolute()}); "
            f"type {option}=FILE with a {EXTENSIONS} file, a glob, or hub:NAME:SPLIT"
        )
    return found


def _rows(path: Path, fields: tuple[str, str], option: str) -> Iterator[PlacedRow]:
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path, fields)
        elif suffix.removesuffix(".gz") in readers:
            yield from readers[suffix.removesuffix(".gz")](path)
        else:
            raise UsageError(f"{option}: {path} has an unknown extension; it must be a {EXTENSIONS} file")
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{option}: {path} cannot be read ({error})") from error


def _jsonl_rows(path: Path) -> Iterator[PlacedRow]:
    # Read as bytes, so that a line of bad UTF-8 spoils itself alone.
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                yield place, f"bad UTF-8 at byte {error.start + 1}"
            except (ValueError, RecursionError) as error:
                yield place, f"not JSON ({error})"
            else:
                yield place, row if isinstance(row, dict) else "not a JSON object"


def _csv_rows(path: Path) -> Iterator[PlacedRow]:
    how = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    with gzip.open(path, "rt", **how) if path.suffix == ".gz" else open(path, **how) as text:
        reader = csv.reader(text, strict=True)
        header = None
        while True:
            # A cell may span lines, so a row is named by the line it begins on.
            place = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, f"not csv ({error})"
                continue
            if not cells:
                continue
            if header is None:
                header = cells
            elif len(cells) != len(header):
                yield place, f"{len(cells)} cells, but the header has {len(header)}"
            else:
                yield place, dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path, fields: tuple[str, str]) -> Iterator[PlacedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        known = file.schema_arrow.names
        columns = list(dict.fromkeys(fields)) if set(fields) <= set(known) else None
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except pyarrow.ArrowInvalid as error:
        raise OSError(f"not a parquet file: {error}") from error


def _hub_rows(item: str, fields: tuple[str, str], option: str) -> Iterator[PlacedRow]:
    # Slow to import, and most runs read files.
    from datasets import load_dataset

    name, _, split = item.removeprefix("hub:").partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
        if set(fields) <= set(rows.column_names):
            rows = rows.select_columns(list(dict.fromkeys(fields)))
    except Exception as error:  # the network, the hub and the parsers raise many types
        raise UsageError(
            f"{option}={item} could not be loaded ({type(error).__name__}: {error}); check the name, the split "
            f"(hub:NAME:SPLIT) and the network, or download its file and type {option}=FILE.parquet"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{item}:{number}", row
