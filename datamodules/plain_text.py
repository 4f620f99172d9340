"""A tokenizer for which text is text: a special token that a text spells becomes ordinary tokens, never its id.

`split_special_tokens=True` is not enough. It leaves tokens alone that are not marked as special, and a model of words or
pieces, or merges that were learned from texts with "<mask>" in them, still find the id of "<mask>" in its vocabulary.
"""

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's backend, without padding and truncation, that gives no text the id of a special token.

    The unknown token alone is still given, for what the vocabulary cannot spell. Ids are those of `tokenizer`. A special
    token of one character stays what it is: no other token could spell that character.
    """
    return backend_of(plain_description(tokenizer))


def backend_of(description: str) -> Tokenizer:
    """The backend that a description of `plain_description` stands for, without padding and truncation."""
    backend = Tokenizer.from_str(description)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def plain_description(tokenizer: PreTrainedTokenizerFast) -> str:
    """The backend of `plain_backend` as JSON; the tokenizer's own JSON where that gives no text a special token's id."""
    original = tokenizer.backend_tokenizer.to_str()
    described = json.loads(original)
    added, model = described["added_tokens"], described["model"]
    special = {token["content"] for token in added if token["special"]} | set(tokenizer.all_special_tokens)
    special = {token for token in special if len(token) > 1}
    # 1. all of them are marked, so that the backend does not look for them
    unmarked = [token for token in added if token["content"] in special and not token["special"]]
    for token in unmarked:
        token["special"] = True
    # 2. those that the model could still find get names that no text spells
    names = {token: f"\uffff special {token}" for token in _spelled_by(model, special)}
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
    _rename(model, names)
    return json.dumps(described) if unmarked or names else original


def _spelled_by(model: dict[str, Any], special: set[str]) -> set[str]:
    """The special tokens that the model itself may find in a text."""
    vocabulary = model["vocab"]
    known = special & ({piece for piece, _ in vocabulary} if isinstance(vocabulary, list) else vocabulary.keys())
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return known
    return known & {_merged(model, merge) for merge in model["merges"]}


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Give tokens of the model's vocabulary other names, and take away the merges that make them or are made of them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if names and "merges" in model:
        merges = model["merges"]
        model["merges"] = [merge for merge in merges if not names.keys() & {*_parts(merge), _merged(model, merge)}]


def _parts(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _merged(model: dict[str, Any], merge: str | list[str]) -> str:
    first, second = _parts(merge)
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")
