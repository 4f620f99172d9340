"""OpenWebText (Gokaslan and Cohen, 2019) as files that `data.train` and `data.test` read.

    hf download Skylion007/openwebtext --repo-type dataset --include "plain_text/*.parquet" --local-dir openwebtext
    python -m datamodules.owt openwebtext/plain_text owt

writes owt/train.jsonl and owt/test.jsonl, a document a line, in the order of the files. The test split are the last 100,000
documents, as in MDLM's code (Sahoo et al., 2406.07524) and the works that follow it.
"""

import warnings
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from datamodules.benchmark_files import convert
from datamodules.documents import DocumentReader, Problems
from models.functional.errors import UsageError

HELD_OUT = 100_000
KINDS = ("*.parquet", "*.jsonl", "*.jsonl.gz")


def documents(folder: Path, split: str) -> Iterator[str]:
    """The documents of a split: `test` the last HELD_OUT of the files, sorted by name, `train` those before them.

    Errors: UsageError where the folder has none of KINDS, and where it has no more than HELD_OUT documents.
    """
    texts = _texts(folder)
    waiting = deque(islice(texts, HELD_OUT))  # the last ones that were read
    more = False
    for text in texts:
        more = True
        waiting.append(text)
        before = waiting.popleft()
        if split == "train":
            yield before
    if not more:
        raise UsageError(
            f"{folder} has no more than the {HELD_OUT:,} documents of the test split; type the folder of all files"
        )
    if split == "test":
        yield from waiting


def _texts(folder: Path) -> Iterator[str]:
    paths = next((found for kind in KINDS if (found := sorted(folder.glob(kind)))), None)
    if paths is None:
        raise UsageError(f"{folder} has no {', '.join(KINDS)}; type the folder with the files of OpenWebText")
    held, problems = [], Problems()
    for passage in DocumentReader().read(paths, "source", problems):
        if passage.opens and held:
            yield "".join(held)
            held = []
        held.append(passage.text)
    if held:
        yield "".join(held)
    if problems.count:
        warnings.warn(f"{problems.count} documents were left out:\n{problems}", stacklevel=2)


def main(arguments: list[str] | None = None) -> None:
    convert(documents, "folder with the files of OpenWebText", __doc__, arguments)


if __name__ == "__main__":
    main()
