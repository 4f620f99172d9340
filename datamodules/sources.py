"""Where a corpus is read from: jsonl, csv, parquet and text files, globs of them, or a data set of the Hugging Face hub.

Everything is read as a stream. A row that cannot be used comes with its place ("file:line") and the reason.
"""

import csv
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from models.functional.errors import UsageError

ROW_EXTENSIONS = ".jsonl, .jsonl.gz, .csv, .csv.gz or .parquet"
SHOWN_PROBLEMS = 5
PARQUET_ROWS = 256  # decoded at a time
PARQUET_BUFFER = 2**20

Source = str | os.PathLike | Iterable[str | os.PathLike]
# A row read, or the reason why it could not be, with the place it stands at ("file:line").
PlacedRow = tuple[str, dict[str, Any] | str]
# Called with how many bytes have just been read.
Meter = Callable[[float], None]


def unwatched(read: float) -> None:
    """The meter of readers whose progress nobody follows."""


# -- finding ----------------------------------------------------------------------------------------------------------


def items_of(source: Source) -> list[str | os.PathLike]:
    """The items of a source, which may be a single one."""
    return [source] if isinstance(source, str | os.PathLike) else list(source)


def is_hub(item: str | os.PathLike) -> bool:
    return str(item).startswith("hub:")


def find_files(item: str | os.PathLike, option: str, extensions: str = ROW_EXTENSIONS) -> list[Path]:
    """The files that a path or a glob names, sorted. Raises UsageError for a folder and where there is none."""
    path = Path(item).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise UsageError(f"{option}={item} is a folder; type {option}='{item}/*.jsonl'")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not found:
        raise UsageError(
            f"{option}={item} does not exist (looked for {path.absolute()}); "
            f"type {option}=FILE with a {extensions} file, a glob, or hub:NAME:SPLIT"
        )
    return found


def suffix_of(path: Path) -> str:
    """The extension, with what is before it where it is .gz."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


# -- from files to rows -----------------------------------------------------------------------------------------------


def read_rows(
    path: Path, fields: Sequence[str], option: str, meter: Meter = unwatched, extensions: str = ROW_EXTENSIONS
) -> Iterator[PlacedRow]:
    """The rows of a file; of a parquet file only the given fields, where it has them all."""
    suffix = suffix_of(path)
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    with readable(path, option):
        if suffix == ".parquet":
            yield from _parquet_rows(path, fields, meter)
        elif suffix.removesuffix(".gz") in readers:
            yield from readers[suffix.removesuffix(".gz")](path, meter)
        else:
            raise UsageError(f"{option}: {path} has an unknown extension; it must be a {extensions} file")


@contextmanager
def readable(path: Path, option: str) -> Iterator[None]:
    """Whatever keeps a file from being read becomes a UsageError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{option}: {path} cannot be read ({error})") from error


class _MeteredFile(io.FileIO):
    """A file that tells how many of its bytes were read."""

    def __init__(self, path: Path, meter: Meter) -> None:
        super().__init__(path, "rb")
        self.meter = meter

    def readinto(self, buffer) -> int:
        read = super().readinto(buffer)
        self.meter(read)
        return read


def open_raw(path: Path, meter: Meter = unwatched) -> BinaryIO:
    """A file's bytes as they are on disk."""
    return io.BufferedReader(_MeteredFile(path, meter), 2**17)


def open_bytes(path: Path, meter: Meter = unwatched) -> BinaryIO:
    """A file's bytes, unzipped where its name ends in .gz; the meter counts those on disk."""
    raw = open_raw(path, meter)
    return io.BufferedReader(_Unzipped(raw), 2**17) if path.suffix == ".gz" else raw


class _Unzipped(gzip.GzipFile):
    """A gzip stream that closes the file below it too."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__(fileobj=raw, mode="rb")
        self.raw_file = raw

    def close(self) -> None:
        super().close()
        self.raw_file.close()


def _jsonl_rows(path: Path, meter: Meter) -> Iterator[PlacedRow]:
    # Read as bytes, so that a line of bad UTF-8 spoils itself alone.
    with open_bytes(path, meter) as lines:
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


def _csv_rows(path: Path, meter: Meter) -> Iterator[PlacedRow]:
    with io.TextIOWrapper(open_bytes(path, meter), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
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


def _parquet_rows(path: Path, fields: Sequence[str], meter: Meter) -> Iterator[PlacedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
            known = file.schema_arrow.names
            columns = list(dict.fromkeys(fields)) if set(fields) <= set(known) else None
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            number = 0
            # buffers and threads would read a whole row group ahead, whatever its size
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
                meter(share * batch.num_rows)
    except pyarrow.ArrowInvalid as error:
        raise OSError(f"not a parquet file: {error}") from error


def load_hub(item: str, fields: Sequence[str], option: str) -> Any:
    """The `datasets.Dataset` that hub:NAME:SPLIT names, with the given fields alone where it has them all."""
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
    return rows


def hub_rows(item: str, fields: Sequence[str], option: str, meter: Meter = unwatched) -> Iterator[PlacedRow]:
    rows = load_hub(item, fields, option)
    share = hub_bytes(rows) / max(1, len(rows))
    for number, row in enumerate(rows, start=1):
        yield f"{item}:{number}", row
        meter(share)


def hub_bytes(rows: Any) -> int:
    """Bytes of a data set's table."""
    return rows.data.nbytes


# -- from rows to text ------------------------------------------------------------------------------------------------


def text_of(row: dict[str, Any], name: str) -> str:
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


def no_such_field(where: str, option: str, name: str, fields: Iterable[str]) -> UsageError:
    choices = ", ".join(map(str, fields))
    return UsageError(f"{where} has no field {name!r}; type data.{option}=NAME with one of its fields: {choices}")


def first_few(problems: Sequence[str], count: int | None = None) -> str:
    """The first problems, one a line, and how many more there are of `count` (all that are given)."""
    more = (len(problems) if count is None else count) - SHOWN_PROBLEMS
    return "\n".join(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]) + (f"\n  and {more} more" * (more > 0))
