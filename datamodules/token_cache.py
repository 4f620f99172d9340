"""A corpus as tokens on disk: read and tokenised once, then memory-mapped.

A folder holds, one document after the other, `tokens.bin` (`<bos>`, then the text's tokens), `target_bytes.bin` (bytes of
text that each token encodes, 0 for `<bos>`), `starts.bin` (where each document begins), `hashes.bin` (of its text) and
`about.json`. Its name is a hash of the files' content, of how they are cut and of the tokenizer.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from datamodules.documents import EXTENSIONS, DocumentReader, Passage, Problems
from datamodules.encoder import Encoder
from datamodules.progress import ReadingProgress
from datamodules.sources import (
    Meter,
    Source,
    hub_bytes,
    is_hub,
    listed,
    load_hub,
    open_raw,
    readable,
    suffix_of,
)
from models.functional.errors import UsageError

# Part of the folder's name: raise it when what is written below changes.
LAYOUT = 1
# Characters that are tokenised together; with the tokenizer's own objects about 200 bytes of memory each.
BATCH = 2**19


class TokenCache:
    """The memory-mapped files of a finished folder. It travels to worker processes by its path alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text())
        self.tokens = self._map("tokens.bin", self.about["id_type"])
        self.target_bytes = self._map("target_bytes.bin", self.about["bytes_type"])
        self.starts = self._map("starts.bin", np.int64)
        self.hashes = self._map("hashes.bin", np.uint64)

    def _map(self, name: str, kind: Any) -> np.ndarray:
        # a plain view: slices of np.memmap itself cost several times as much
        return np.memmap(self.folder / name, kind, mode="r").view(np.ndarray)

    def __reduce__(self) -> tuple:
        return TokenCache, (self.folder,)


def tokenize_once(
    source: Source,
    reader: DocumentReader,
    encoder: Encoder,
    start_id: int,
    cache_dir: str | os.PathLike,
    option: str,
) -> TokenCache:
    """The tokens of a source, from cache_dir where the same content has been tokenised before.

    start_id: put before each document. One process writes while others wait; nothing unfinished is ever found.
    Raises UsageError for what cannot be read or written, and for a source without a document.
    """
    cache_dir = Path(cache_dir).expanduser()
    try:
        content, total = _content(source, reader, option)
        made_from = [LAYOUT, content, vars(reader), encoder.fingerprint, start_id]
        folder = cache_dir / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:20]
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "about.json").is_file():
                unfinished = folder.with_name(f".unfinished-{folder.name}")
                shutil.rmtree(unfinished, ignore_errors=True)  # what a killed run has left
                try:
                    unfinished.mkdir()
                    with ReadingProgress(f"{option}: tokenising", total) as meter:
                        _write(unfinished, source, reader, encoder, start_id, option, meter)
                    if _content(source, reader, option) != (content, total):
                        raise UsageError(f"{option}: a file has changed while it was read; start again")
                    os.replace(unfinished, folder)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"the tokens of {option} cannot be kept in {cache_dir} ({error}); "
            f"type data.cache_dir=FOLDER with a folder that has room and that you can write to"
        ) from error
    return TokenCache(folder)


# -- what the content is ----------------------------------------------------------------------------------------------


def _content(source: Source, reader: DocumentReader, option: str) -> tuple[list[str], int]:
    """A hash of each file or data set, and the bytes of all of them."""
    hashes, total = [], 0
    for item in listed(source, option, EXTENSIONS):
        if is_hub(item):
            rows = load_hub(str(item), [reader.text_field], option)
            hashes.append(f"hub {rows._fingerprint}")
            total += hub_bytes(rows)
        else:
            found, size = _file_hash(Path(item), option)
            hashes.append(found)
            total += size
    if not hashes:
        raise UsageError(f"{option} names no file; type {option}=FILE.jsonl")
    return hashes, total


def _file_hash(path: Path, option: str) -> tuple[str, int]:
    """sha256 of a file with its extension, and its size.

    The whole file is read at every start, about half a second a gigabyte that is in memory already: a file may have been
    replaced by one of the same size and time (`cp -p`, `rsync -t`, `tar`).
    """
    with readable(path, option):
        size = path.stat().st_size
    progress = ReadingProgress(f"{option}: looking through {path.name}", size)
    with readable(path, option), progress as meter, open_raw(path, meter) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() + suffix_of(path), size


# -- tokenising -------------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    source: Source,
    reader: DocumentReader,
    encoder: Encoder,
    start_id: int,
    option: str,
    meter: Meter,
) -> None:
    problems = Problems()
    with TokenWriter(folder, encoder, start_id) as writer:
        for batch in _batches(reader.read(source, option, problems, meter)):
            for passage, (ids, sizes) in zip(batch, encoder([passage.text for passage in batch]), strict=True):
                writer.add(passage, ids, sizes)
    if not writer.documents:
        raise UsageError(f"{option} has no document; {problems.count} lines or files are of no use:\n{problems}")
    about = writer.about() | {"unusable": problems.count, "first_unusable": str(problems)}
    (folder / "about.json").write_text(json.dumps(about, indent=2))


def _batches(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    batch, size = [], 0
    for passage in passages:
        batch.append(passage)
        size += len(passage.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class TokenWriter:
    """Writes the files that `TokenCache` maps, passage after passage."""

    def __init__(self, folder: Path, encoder: Encoder, start_id: int) -> None:
        self.folder, self.encoder, self.start_id = folder, encoder, start_id
        self.tokens = self.documents = self.text_bytes = self.unknown = 0
        self._files = ExitStack()

    def __enter__(self) -> "TokenWriter":
        names = ("tokens.bin", "target_bytes.bin", "starts.bin", "hashes.bin")
        files = [self._files.enter_context(open(self.folder / name, "wb")) for name in names]  # noqa: SIM115
        self._tokens, self._bytes, self._starts, self._hashes = files
        return self

    def __exit__(self, *_: object) -> None:
        self._end_document()
        self._files.close()

    def add(self, passage: Passage, ids: np.ndarray, sizes: np.ndarray) -> None:
        """ids, sizes (N,): the passage's tokens, and the bytes that each stands for."""
        if sizes.max(initial=0) > np.iinfo(self.encoder.bytes_type).max:
            raise UsageError(f"{passage.location}: one token stands for {sizes.max()} bytes of text, which is too much")
        self.unknown += int((ids == self.encoder.unknown_id).sum())  # of the text: GPT-2's end token is its unknown one
        if passage.opens:
            self._end_document()
            self._hash = hashlib.sha256()
            self._starts.write(np.int64(self.tokens).tobytes())
            self.documents += 1
            ids, sizes = np.append(self.start_id, ids), np.append(0, sizes)
        self._hash.update(passage.text.encode())
        self._tokens.write(ids.astype(self.encoder.id_type).tobytes())
        self._bytes.write(sizes.astype(self.encoder.bytes_type).tobytes())
        self.tokens += len(ids)
        self.text_bytes += int(sizes.sum())

    def about(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("tokens", "documents", "text_bytes", "unknown")}
        kinds = {name: np.dtype(getattr(self.encoder, name)).name for name in ("id_type", "bytes_type")}
        return counts | kinds

    def _end_document(self) -> None:
        if self.documents:
            self._hashes.write(self._hash.digest()[:8])
