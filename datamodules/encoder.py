"""From text to token ids, with how many bytes of the text each token encodes.

The counts add up to the text's length in UTF-8 whatever the tokenizer does to it (prefix spaces, normal forms, lower case),
so that bits per byte mean the same for all tokenizers. Legend: V vocabulary, N tokens of a text, C its characters.
"""

import hashlib
import json
import re

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from datamodules.plain_text import backend_of, plain_description
from models.functional.vocabulary import vocabulary_size

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Encoder:
    """Encodes texts with a tokenizer of its own: nothing is added, padded or cut, and "<mask>" in a text is six characters.

    id_type, bytes_type: the numpy types that hold every id and every count. fingerprint: changes with the tokenizer.
    unknown_id: -1 where there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        description = plain_description(tokenizer)
        self.fingerprint = hashlib.sha256(description.encode()).hexdigest()
        self.backend = backend_of(description)
        described = json.loads(description)
        self.byte_level = '"ByteLevel"' in json.dumps(described["decoder"])
        self.id_of_byte = (
            _ids_of_bytes(self.backend) if self.byte_level and described["model"].get("merges") == [] else None
        )
        self.unknown_id = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        self.widths = _widths(tokenizer, self.unknown_id, self.byte_level)
        self.id_type = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32
        # a byte-level token never spells more than its own name; any other may include a long run of dropped spaces
        self.bytes_type = np.uint16 if self.byte_level else np.uint32

    def __call__(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids (N,), bytes (N,)) of each text."""
        if self.id_of_byte is not None:
            ids = [self.id_of_byte[np.frombuffer(text.encode(), np.uint8)] for text in texts]
            return [(some, np.ones(len(some), np.int64)) for some in ids]
        if not self.byte_level:
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
            return [(np.array(e.ids, np.int64), self._by_offsets(t, e)) for t, e in zip(texts, encodings, strict=True)]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._by_widths(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _by_widths(self, text: str, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
        """What byte-level tokens spell, where together they spell the text itself."""
        ids = np.array(encoding.ids, np.int64)
        sizes = self.widths[ids]
        normalizer = self.backend.normalizer
        as_it_is = normalizer is None or normalizer.normalize_str(text) == text
        if as_it_is and sizes.sum() == len(text.encode()):
            return ids, sizes
        return ids, self._by_offsets(text, self.backend.encode(text, add_special_tokens=False))

    def _by_offsets(self, text: str, encoding: Encoding) -> np.ndarray:
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return bytes_of_spans(text, offsets[:, 0], offsets[:, 1], self.widths[np.array(encoding.ids, np.int64)])


def bytes_of_spans(text: str, starts: np.ndarray, ends: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """UTF-8 bytes (N,) that tokens with the character spans [starts, ends) encode; their sum is that of the text.

    What lies between two spans (dropped spaces, a combining mark) belongs to the token before it, what precedes the first to
    the first. Where tokens share a character each takes its width in bytes, the last first: a prefix that was put in front
    gets what is left.
    """
    if not len(starts):
        return np.zeros(0, np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    byte_of = np.concatenate([[0], np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF))])
    # groups of tokens that share characters, most of them of one token
    firsts = np.flatnonzero(np.append(True, starts[1:] >= ends[:-1]))
    lasts = np.append(firsts[1:], len(starts)) - 1
    begins = np.maximum.accumulate(byte_of[starts[firsts]])
    begins[0] = 0
    totals = np.diff(begins, append=byte_of[-1])
    sizes = np.zeros(len(starts), np.int64)
    sizes[firsts] = totals
    for group in np.flatnonzero(lasts > firsts):
        left = totals[group]
        for token in range(lasts[group], firsts[group], -1):
            sizes[token] = min(widths[token], left)
            left -= sizes[token]
        sizes[firsts[group]] = left
    return sizes


def _ids_of_bytes(backend: Tokenizer) -> np.ndarray | None:
    """The id (256,) of each byte, where a tokenizer without merges turns every text into those of its bytes."""
    found = [backend.token_to_id(character) for _, character in sorted(bytes_to_unicode().items())]
    if None in found:
        return None
    ids = np.array(found, np.int64)
    probe = "".join(map(chr, range(0x800))) + "\u0fff\uffff\U0001ffff\U0010ffff"
    encoded = backend.encode(probe, add_special_tokens=False).ids
    return ids if encoded == ids[np.frombuffer(probe.encode(), np.uint8)].tolist() else None


def _widths(tokenizer: PreTrainedTokenizerFast, unknown_id: int, byte_level: bool) -> np.ndarray:
    """Bytes (V,) that each token spells. Whatever stands for an unknown byte counts as that one byte."""
    vocabulary = tokenizer.get_vocab()
    widths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        if number == unknown_id or BYTE_TOKEN.fullmatch(token):
            widths[number] = 1
        elif byte_level:
            widths[number] = len(token)
        else:
            widths[number] = len(token.removeprefix("##").replace("▁", " ").encode())
    return widths
