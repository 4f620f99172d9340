"""Corpora of files that the tests share."""

import pytest
from helpers.pairs import ROWS, write

from datamodules.pairs import PairsDataModule


@pytest.fixture
def build_pairs(tmp_path):
    """A function that makes a set-up datamodule; rows given as lists are written to files first."""

    def make(setup=True, **options):
        options = {"train": ROWS, **options}
        for split in ("train", "val", "test"):
            if isinstance(options.get(split), list):
                options[split] = write(tmp_path / f"{split}.jsonl", options[split])
        defaults = {
            "name": "pairs",
            "prompt_field": "q",
            "response_field": "a",
            "tokenizer": "byte",
            "vocab_size": 512,
            "batch_size": 4,
            "eval_batch_size": 4,
            "cache_dir": tmp_path / "cache",
        }
        datamodule = PairsDataModule(**{**defaults, **options})
        if setup:
            datamodule.setup("fit")
        return datamodule

    return make
