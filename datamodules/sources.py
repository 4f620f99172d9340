"""Where a corpus is read from: jsonl, csv, parquet and text files, globs of them, or a data set of the Hugging Face hub.

Everything is read as a stream. A row that cannot be used comes with its location ("file:line") and the reason.
"""

import glob
import gzip
import io
import json
import math
import os
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.csv_records import csv_records, declared_delimiter, find_delimiter
from datamodules.text_encoding import require_utf8
from models.functional.errors import UsageError

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
ROW_EXTENSIONS = f"{', '.join(ROW_SUFFIXES[:-1])} or {ROW_SUFFIXES[-1]}"
SHOWN_PROBLEMS = 5
PARQUET_ROWS = 256  # decoded at a time
PARQUET_BUFFER = 2**20
# Messages of readers about bytes that are not UTF-8. Outside of csv the second is about half a character, which JSON can hold.
ANOTHER_ENCODING = re.compile(r": bad UTF-8 at byte \d+$|\.csv(\.gz)?:\d+: .* is not valid UTF-8$", re.IGNORECASE)

Source = str | os.PathLike | Iterable[str | os.PathLike]
# A row read, or the reason why it could not be, after its location ("file:line").
LocatedRow = tuple[str, dict[str, Any] | str]
# Called with how many bytes have just been read.
Meter = Callable[[float], None]


def no_meter(read: float) -> None:
    """A meter that does nothing."""


# -- finding ----------------------------------------------------------------------------------------------------------


def items_of(source: Source) -> list[str | os.PathLike]:
    """The items of a source, which may be a single one."""
    return [source] if isinstance(source, str | os.PathLike) else list(source)


def is_hub(item: str | os.PathLike) -> bool:
    """Whether an item names a data set of the hub. A path object always names a file."""
    return isinstance(item, str) and item.startswith("hub:")


def listed(source: Source, option: str, extensions: str = ROW_EXTENSIONS) -> list[str | os.PathLike]:
    """The data sets of the hub ("hub:NAME:SPLIT") and the files (Path) of a source, in the order in which they are read.

    The list is a source itself, which does not change while files come and go. Errors: those of `find_files`.
    """
    found: list[str | os.PathLike] = []
    for item in items_of(source):
        found += [item] if is_hub(item) else find_files(item, option, extensions)
    return found


def find_files(item: str | os.PathLike, option: str, extensions: str = ROW_EXTENSIONS) -> list[Path]:
    """The files that a path or a glob names, sorted. What exists is never read as a glob, whatever its name.

    Raises UsageError for a folder and where there is no file.
    """
    path = Path(os.path.expanduser(item))
    if os.path.isfile(path):  # False, where the methods of Path raise: too long a name, a zero byte
        return [path]
    if os.path.isdir(path):
        raise UsageError(
            f"{option}={item} is a folder; type {option}='{Path(item)}/*{_usual_suffix(path, extensions)}'"
        )
    found = _matches(_folder_escaped(path)) or _matches(str(path))
    if not found:
        raise UsageError(
            f"{option}={item} does not exist (looked for {path.absolute()}); "
            f"type {option}=FILE with a {extensions} file, a glob, or hub:NAME:SPLIT"
        )
    return found


def _usual_suffix(folder: Path, extensions: str) -> str:
    """The extension of most of the files in a folder that can be read; .jsonl where there is none."""
    known = [suffix for file in folder.iterdir() if (suffix := suffix_of(file)) and suffix in extensions]
    return max(sorted(set(known)), key=known.count, default=".jsonl")


def _matches(pattern: str) -> list[Path]:
    """The files that a glob matches, sorted."""
    return sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))


def _folder_escaped(path: Path) -> str:
    """A glob in which the part of the path that exists as a folder is literal."""
    folder = next((parent for parent in path.parents if os.path.isdir(parent)), Path())
    return str(Path(glob.escape(str(folder)), path.relative_to(folder)))


def suffix_of(path: Path) -> str:
    """The extension in small letters, with what is before it where it is .gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def warn_of_repeats(sources: Mapping[str, Sequence[str | os.PathLike]]) -> None:
    """Warn of a file that a split names several times, by a glob or another path to it as well. sources: {split: `listed`}."""
    for split, items in sources.items():
        for path, times in Counter(os.path.realpath(item) for item in items if not is_hub(item)).items():
            if times > 1:
                rank_zero_warn(f"data.{split} names {path} {times} times, so its rows count as often; name it once")


def warn_of_known_texts(split: str, known: int, total: int, what: str) -> None:
    """Warn where some of a split's texts are trained on. what: rows or documents."""
    if known:
        rank_zero_warn(
            f"data.{split}: {known:,} of its {total:,} {what} are in data.train too, so its figures are not of unseen text"
        )


# -- from files to rows -----------------------------------------------------------------------------------------------


def read_rows(
    path: Path, fields: Sequence[str], option: str, meter: Meter = no_meter, extensions: str = ROW_EXTENSIONS
) -> Iterator[LocatedRow]:
    """The rows of a file; of a parquet file only the given fields, where it has them all."""
    suffix = suffix_of(path)
    readers = {".jsonl": _jsonl_rows, ".jsonl.gz": _jsonl_rows, ".csv": _csv_rows, ".csv.gz": _csv_rows}
    with readable(path, option):
        if suffix in readers:
            yield from readers[suffix](path, fields, meter)
        elif suffix == ".parquet":
            yield from _parquet_rows(path, fields, meter)
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
    """A file that reports to a meter how many of its bytes were read."""

    def __init__(self, path: Path, meter: Meter) -> None:
        super().__init__(path, "rb")
        self.meter = meter

    def readinto(self, buffer) -> int:
        read = super().readinto(buffer)
        self.meter(read)
        return read


def open_raw(path: Path, meter: Meter = no_meter) -> io.BufferedReader:
    """A file's bytes as they are on disk."""
    return io.BufferedReader(_MeteredFile(path, meter), 2**17)


def open_bytes(path: Path, meter: Meter = no_meter) -> io.BufferedReader:
    """The bytes of a file of UTF-8, unzipped where its name ends in .gz; the meter counts those on disk.

    Raises OSError for a file in UTF-16 or UTF-32.
    """
    raw = open_raw(path, meter)
    zipped = path.suffix.lower() == ".gz"
    file: io.BufferedReader = io.BufferedReader(_Unzipped(raw), 2**17) if zipped else raw
    try:
        require_utf8(file.peek())
    except BaseException:
        file.close()
        raise
    return file


class _Unzipped(gzip.GzipFile):
    """A gzip stream that closes the file below it too."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__(fileobj=raw, mode="rb")
        self.raw_file = raw

    def close(self) -> None:
        super().close()
        self.raw_file.close()


def _jsonl_rows(path: Path, fields: Sequence[str], meter: Meter) -> Iterator[LocatedRow]:
    # Read as bytes, so that a line of bad UTF-8 spoils itself alone.
    with open_bytes(path, meter) as lines:
        for number, line in enumerate(lines, start=1):
            location = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text, object_pairs_hook=_without_duplicates)
            except UnicodeDecodeError as error:
                yield location, f"bad UTF-8 at byte {error.start + 1}"
            except (ValueError, RecursionError) as error:
                yield location, _not_json(text, error, path)
            else:
                yield location, row if isinstance(row, dict) else _not_an_object(row, fields, path)


def _not_an_object(row: Any, fields: Sequence[str], path: Path) -> str:
    if isinstance(row, list) and row and isinstance(row[0], dict):
        return f"not a JSON object{_split_by_jq('.[]', path)}"
    wanted = ", ".join(f"{json.dumps(name, ensure_ascii=False)}: ..." for name in dict.fromkeys(fields))
    return f"not a JSON object; a line must be {{{wanted}}}"


def _not_json(line: str, error: Exception, path: Path) -> str:
    """Why a line of jsonl cannot be read, with what to do about files that hold JSON of another layout."""
    if line in ("{", "["):
        return f"not JSON by itself: it goes on in the next line{_split_by_jq('.' if line == '{' else '.[]', path)}"
    if line.endswith(","):
        return "not JSON (a comma follows what the line holds)"
    return f"not JSON ({error})"


def _split_by_jq(parts: str, path: Path) -> str:
    """How the objects of a file come to stand one in a line. parts: the filter of jq that yields them."""
    quoted = shlex.quote(parts)
    zipped = path.suffix.lower() == ".gz"
    typed = f"gzip -dc FILE | jq -c {quoted} > NEW" if zipped else f"jq -c {quoted} FILE > NEW"
    return f"; `{typed}` writes an object a line"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where it has a name twice, of which `json` would keep the last silently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"an object has the field {_twice(name for name, _ in pairs)!r} twice")
    return found


def _csv_rows(path: Path, fields: Sequence[str], meter: Meter) -> Iterator[LocatedRow]:
    with _csv_text(path) as text:
        declared = declared_delimiter(text)
    delimiter = declared or find_delimiter(lambda: _csv_text(path), fields)
    if declared is None and delimiter != ",":
        rank_zero_warn(f"{path}: its header is separated by {delimiter!r}, so it is read with that instead of a comma")
    with _csv_text(path, meter) as text:
        header: list[str] | None = None
        for line, cells in csv_records(text, delimiter):
            location = f"{path}:{line}"
            if line == 1 and declared is not None:
                continue
            if isinstance(cells, str):
                yield location, cells
            elif header is None:
                header = cells
                _require_different(header, fields)
            elif len(cells) != len(header):
                shown = "" if set(fields) <= set(header) else f" ({','.join(header)[:80]!r})"
                yield location, f"{len(cells)} cells, but the header has {len(header)}{shown}"
            else:
                yield location, dict(zip(header, cells, strict=True))


def _csv_text(path: Path, meter: Meter = no_meter) -> io.TextIOWrapper:
    """A csv file as text, with its line ends as they are and bad UTF-8 as lone surrogates."""
    return io.TextIOWrapper(open_bytes(path, meter), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _require_different(columns: Sequence[str], fields: Sequence[str]) -> None:
    """Raise OSError for two columns of one name. Columns without a name do not count, unless `fields` has that name."""
    named = [column for column in columns if column or column in fields]
    if len(set(named)) != len(named):
        raise OSError(f"two of its columns are named {_twice(named)!r}; rename one of them")


def _twice(names: Iterable[str]) -> str:
    """The first of the names that occur more than once."""
    return next(name for name, count in Counter(names).items() if count > 1)


def _parquet_rows(path: Path, fields: Sequence[str], meter: Meter) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
            known = file.schema_arrow.names
            _require_different(known, fields)
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


def hub_rows(item: str, fields: Sequence[str], option: str, meter: Meter = no_meter) -> Iterator[LocatedRow]:
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
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        raise ValueError(f"field {name!r} has no value ({value})")
    if isinstance(value, dict | list | bytes):
        raise ValueError(f"field {name!r} holds {type(value).__name__}, not text")
    return valid_text(str(value), f"field {name!r}")


def valid_text(text: str, what: str) -> str:
    """The text itself; ValueError where it holds a lone surrogate, which UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid UTF-8") from error
    return text


def no_such_field(where: str, option: str, name: str, fields: Iterable[str]) -> UsageError:
    shown = {field: str(field).encode(errors="backslashreplace").decode() for field in fields}
    choices = ", ".join(text if text == text.strip() else repr(text) for text in shown.values())
    message = f"{where} has no field {name!r}; type data.{option}=NAME with one of its fields: {choices}"
    near = [text for text in shown.values() if text != name and text.strip().lower() == name.strip().lower()]
    if near:
        message += f" ({near[0]!r} differs only in spaces or capitals)"
    if suffix_of(Path(where)) in (".csv", ".csv.gz"):
        message += "; the first line of a csv file holds their names"
    return UsageError(message)


def first_few(problems: Sequence[str], count: int | None = None) -> str:
    """The first problems, one a line, and how many more there are of `count` (all that are given)."""
    more = (len(problems) if count is None else count) - SHOWN_PROBLEMS
    lines = [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    lines += [f"  and {more} more"] if more > 0 else []
    if any(ANOTHER_ENCODING.search(line) for line in lines):
        lines.append(
            "  only UTF-8 is read; a file in another encoding is converted by naming it, such as "
            "`iconv -f windows-1252 -t UTF-8 FILE > NEW`"
        )
    return "\n".join(lines)
