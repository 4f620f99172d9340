"""What a run keeps of its corpus, so that ids and rows mean later what they meant in its training.

A folder holds the tokenizer's files, `corpus.json` and, where documents or prompts were held out, their hashes in
`held_out.npz`.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from datamodules.sources import Source, is_hub, items_of
from datamodules.tokenizer import build_tokenizer, keep_further_ends
from models.functional.errors import UsageError

DESCRIPTION = "corpus.json"
HELD_OUT = "held_out.npz"
TOKENIZER = "tokenizer.json"
FORMAT = 1


@dataclass(frozen=True)
class CorpusState:
    """A run's corpus. None and empty: not known, as of a model's folder, which has a tokenizer alone.

    kind: the class of the datamodule. options: those that decide what ids and rows mean; they must not change.
    seed: of the held-out rows and of the order of rows. prompt_length, response_length: columns of a row.
    fingerprint: of the training rows. sources: {split: where it was read from}. val, test: digests
    of these splits.
    held_out: {split: hashes (N,) uint64 of its prompts or documents}, of splits without a source of their own.
    signals: how texts and slots are numbered. encoding: fingerprint of the tokenizer in the names of token caches.
    example_prompt: the first test prompt.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerFast
    kind: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    prompt_length: int | None = None
    response_length: int | None = None
    fingerprint: str | None = None
    sources: dict[str, list[str] | None] = field(default_factory=dict)
    val: str | None = None
    test: str | None = None
    held_out: dict[str, np.ndarray] = field(default_factory=dict)
    signals: dict[str, Any] | None = None
    encoding: str | None = None
    example_prompt: str | None = None

    def save(self, folder: Path) -> None:
        """Write the folder; the description comes last, so that a folder with one is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        keep_further_ends(self.tokenizer, folder)
        if self.held_out:
            np.savez(folder / HELD_OUT, **self.held_out)  # type: ignore[arg-type]  # keywords are arrays
        beside = ("folder", "tokenizer", "held_out")
        described = {"format": FORMAT} | {name: value for name, value in vars(self).items() if name not in beside}
        unfinished = folder / f"{DESCRIPTION}.partial"
        try:
            unfinished.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
            os.replace(unfinished, folder / DESCRIPTION)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    @classmethod
    def read(cls, folder: Path) -> "CorpusState":
        """Errors: UsageError for a folder that another version wrote, or that is damaged."""
        try:
            described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if described.pop("format") != FORMAT:
                raise UsageError(f"{folder} was written by another version; use that one for this run")
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            held_out = {}
            if (folder / HELD_OUT).is_file():
                with np.load(folder / HELD_OUT, allow_pickle=False) as held:
                    held_out = dict(held)
            return cls(folder=folder, tokenizer=tokenizer, held_out=held_out, **described)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{folder} is damaged ({str(error).splitlines()[0]}): what the run's token ids mean is not known without it; "
                "copy it again, or train again"
            ) from error

    @classmethod
    def of_model(cls, folder: Path, packed: bool) -> "CorpusState":
        """The tokenizer that was saved with a model, and nothing else."""
        return cls(folder=folder, tokenizer=build_tokenizer(str(folder), [], 0, folder, packed=packed))


def is_state(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file()


def absolute_source(source: Source | None) -> list[str] | None:
    """Where a split is read from, whatever the working directory; None for a split without a source."""
    if source is None:
        return None
    return [str(item) if is_hub(item) else str(Path(os.path.expanduser(item)).absolute()) for item in items_of(source)]


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """64 bits of sha256 of each text, (N,) uint64."""
    digests = b"".join(hashlib.sha256(text.encode()).digest()[:8] for text in texts)
    return np.frombuffer(digests, np.uint64)


def among(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of hashes (N,) uint64 are among others (M,) uint64: (N,) bool."""
    return np.isin(hashes, others, kind="sort")  # the other way of numpy 2.0 overflows beyond 2^63


def still_held_out(kept: dict[str, np.ndarray], present: np.ndarray, splits: Iterable[str]) -> bool:
    """Whether what a run held out is held out again: yes where all of it is present, no in data that has none of it.

    kept: {split: hashes}. present: hashes of the data. Errors: UsageError where only a part is present.
    """
    wanted = [split for split in splits if split in kept]
    if not wanted:
        return False
    hashes = np.concatenate([kept[split] for split in wanted])
    found = int(among(hashes, present).sum())
    if 0 < found < len(hashes):
        options = " ".join(f"data.{split}=FILE" for split in wanted)
        raise UsageError(
            f"data.train has {found} of the {len(hashes)} prompts or documents that the run held out of its training; "
            f"restore the others, or type {options}"
        )
    return found > 0
