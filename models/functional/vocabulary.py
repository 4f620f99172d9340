"""The ids of a tokenizer."""

from typing import Any


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id. `len` counts tokens, which are fewer where some ids have none."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
