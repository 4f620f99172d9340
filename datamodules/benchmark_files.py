"""A published corpus as files that `data.train` and `data.test` read: a JSON line {"text": ...} for each document."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from models.functional.errors import UsageError

SPLITS = ("train", "test")


def write_texts(texts: Iterable[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def convert(
    texts: Callable[[Path, str], Iterable[str]], source: str, description: str | None, arguments: list[str] | None
) -> None:
    """The command line `SOURCE TARGET`: writes TARGET/train.jsonl and TARGET/test.jsonl.

    texts: folder, split -> its documents; source: what the first argument has to be. A UsageError ends the command.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("target", type=Path, help="folder for the files")
    args = parser.parse_args(arguments)
    try:
        for split in SPLITS:
            write_texts(texts(args.source, split), args.target / f"{split}.jsonl")
    except UsageError as error:
        parser.error(str(error))
