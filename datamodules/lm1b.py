"""The One Billion Word Benchmark (Chelba et al., 1312.3005) as files that `data.train` and `data.test` read.

    python -m datamodules.lm1b 1-billion-word-language-modeling-benchmark-r13output lm1b

writes lm1b/train.jsonl and lm1b/test.jsonl, a sentence a line.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from datamodules.benchmark_files import convert
from models.functional.errors import UsageError

# split -> its files, a sentence a line; the held-out ones are the split that publications test on
FILES = {
    "train": "training-monolingual.tokenized.shuffled/news.en-*-of-00100",
    "test": "heldout-monolingual.tokenized.shuffled/news.en.heldout-*-of-00050",
}
# what is found, and what it becomes, in the order of application
RULES = [
    (re.compile(found), becomes)
    for found, becomes in (
        (r"(https?) : / / ", r"\1://"),
        (r" '(\w+)", r"'\1"),
        (r" (\w+) \. ", r" \1. "),
        (r" (\w+) \.$", r" \1."),
        (r" \? ", "? "),
        (r" \?$", "?"),
        (r" ! ", "! "),
        (r" !$", "!"),
        (r" , ", ", "),
        (r" : ", ": "),
        (r" ; ", "; "),
        (r" / ", "/"),
        (r'" ([^"]+) "', r'"\1"'),
        (r"' ([^']+) '", r"'\1'"),
        (r"\( ([^()]+) \)", r"(\1)"),
        (r"\[ ([^\[\]]+) \]", r"[\1]"),
        (r"([$£]) ", r"\1"),
    )
]


def detokenize(sentence: str) -> str:
    """A sentence without the benchmark's spaces around punctuation.

    By the rules of MDLM's data (Sahoo et al., 2406.07524), which later publications share: perplexities are of this text.
    """
    for found, becomes in RULES:
        sentence = found.sub(becomes, sentence)
    return sentence


def sentences(folder: Path, split: str) -> Iterator[str]:
    """The detokenised sentences of a split. Errors: UsageError where the folder has none of its files."""
    paths = sorted(folder.glob(FILES[split]))
    if not paths:
        raise UsageError(
            f"{folder} has no {FILES[split]}; type the folder that the benchmark's archive was unpacked to"
        )
    for path in paths:
        with path.open(encoding="utf-8", newline="\n") as lines:
            yield from (detokenize(line.rstrip("\n")) for line in lines)


def main(arguments: list[str] | None = None) -> None:
    convert(sentences, "folder that the benchmark's archive was unpacked to", __doc__, arguments)


if __name__ == "__main__":
    main()
