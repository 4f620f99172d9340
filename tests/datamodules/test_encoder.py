"""How many bytes each token stands for: by hand for every kind of tokenizer, and always as many as the text has."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.encoder import Encoder, bytes_of_spans
from datamodules.tokenizer import build_tokenizer

TRAINING = ["jump left twice", "walk around right 日本語 é", "don't stop, near"] * 5
HARD_TEXTS = [
    " two  spaces ",
    "Café £30 日本語 🦘",
    "tab\tand\nnewline\r\n\x00",
    "<mask> <bos> <eos>",
    "e\u0301 \u2126 \u0958 ﬁ İ",
    "",
    "\n",
    "👩‍👩‍👧 x",
]


def byte_level(prefix_space=False, normalizer=None):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate([*alphabet, "<s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def sentencepiece():
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "▁": 257, "x": 258, "▁x": 259}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "x")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<unk>")


def unigram():
    pieces = [("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0), ("▁", -3.0), ("日", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<unk>")


def wordpiece():
    vocabulary = {"[UNK]": 0, "caf": 1, "##e": 2, "jump": 3, "##s": 4, "[CLS]": 5}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="[CLS]")


FOLDERS = {
    "byte-level": byte_level,
    "byte-level, prefix space": lambda: byte_level(prefix_space=True),
    "byte-level, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "wordpiece": wordpiece,
}
OURS = {"byte": 0, "bpe": 512, "small bpe": 64, "phrases": 512, "words": 64}


@pytest.fixture
def encoder(tmp_path):
    """A function that makes the encoder of one of our tokenizers, or of a folder on disk."""

    def build(kind: str) -> Encoder:
        if kind in FOLDERS:
            FOLDERS[kind]().save_pretrained(tmp_path / "folder")
            tokenizer = build_tokenizer(str(tmp_path / "folder"), [], 0, tmp_path, packed=True)
        else:
            tokenizer = build_tokenizer(kind.removeprefix("small "), TRAINING, OURS[kind], tmp_path, packed=True)
        made = Encoder(tokenizer)
        made.names = {number: token for token, number in tokenizer.get_vocab().items()}
        return made

    return build


def spelled(encoder: Encoder, text: str) -> list[tuple[str, int]]:
    ((ids, sizes),) = encoder([text])
    return [(encoder.names[int(i)], int(n)) for i, n in zip(ids, sizes, strict=True)]


@pytest.mark.parametrize("kind", [*OURS, *FOLDERS])
def test_the_bytes_of_a_text_add_up(encoder, kind):
    encode = encoder(kind)
    for text, (ids, sizes) in zip(HARD_TEXTS, encode(HARD_TEXTS), strict=True):
        assert len(ids) == len(sizes)
        assert sizes.sum() == (len(text.encode()) if len(ids) else 0)
        assert (sizes >= 0).all()
        if "wordpiece" not in kind and kind != "words":
            assert len(ids) > 0 or not text


@pytest.mark.parametrize("kind", ["byte", "byte-level"])
def test_every_byte_is_one(encoder, kind):
    for text in HARD_TEXTS:
        encode = encoder(kind)
        assert [n for _, n in spelled(encode, text)] == [1] * len(text.encode())
        assert encode([text])[0][0].tolist() == encode.backend.encode(text, add_special_tokens=False).ids
        assert encode.id_of_byte is not None
    assert encoder("byte-level, prefix space").id_of_byte is encoder("byte-level, NFC").id_of_byte is None
    assert encoder("bpe").id_of_byte is None


def test_bpe_by_hand(encoder):
    # 日本語 was merged, 日 alone was not: its three bytes are E6 97 A5, the first two of which may be one token
    encode = encoder("bpe")
    ((ids, sizes),) = encode(["jump 日本語é日"])
    pieces = [encode.backend.id_to_token(int(i)) for i in ids]
    assert [len(piece) for piece in pieces] == sizes.tolist()
    assert sizes.sum() == 5 + 9 + 2 + 3
    assert dict(zip(pieces, sizes.tolist(), strict=True))["jump"] == 4


def test_an_unknown_byte_is_one(encoder):
    encode = encoder("small bpe")
    assert spelled(encode, "£ж") == [("<unk>", 1)] * 4
    assert encode.unknown_id == 4


def test_words_take_the_spaces_after_them(encoder):
    assert spelled(encoder("words"), " jump  日本語 unheard \n") == [("jump", 7), ("日本語", 10), ("<unk>", 9)]


def test_a_prefix_that_was_put_in_front_stands_for_nothing(encoder):
    assert spelled(encoder("byte-level, prefix space"), "é日x") == [
        ("Ġ", 0), ("Ã", 1), ("©", 1), ("æ", 1), ("Ĺ", 1), ("¥", 1), ("x", 1)
    ]  # fmt: skip
    assert spelled(encoder("sentencepiece"), "日 é x") == [
        ("▁", 0), ("<0xE6>", 1), ("<0x97>", 1), ("<0xA5>", 1), ("▁", 1), ("<0xC3>", 1), ("<0xA9>", 1), ("▁x", 2)
    ]  # fmt: skip
    assert spelled(encoder("unigram"), "日b ab é") == [
        ("▁", 0),
        ("日", 3),
        ("b", 1),
        ("▁a", 2),
        ("b", 1),
        ("▁", 1),
        ("<unk>", 2),
    ]


def test_lower_case_and_dropped_accents_count_what_was_written(encoder):
    assert spelled(encoder("wordpiece"), "  Café jumps 日\n") == [
        ("caf", 5), ("##e", 3), ("jump", 4), ("##s", 2), ("[UNK]", 4)
    ]  # fmt: skip


def test_a_composed_character_counts_what_it_was_composed_of(encoder):
    found = spelled(encoder("byte-level, NFC"), "xe\u0301y")
    assert found == [("x", 1), ("Ã", 2), ("©", 1), ("y", 1)]


def test_spans_that_share_characters():
    # "é日": tokens of bytes 1 + 3 + 1 over the spans [0, 1), [0, 2), [1, 2)
    sizes = bytes_of_spans("é日", np.array([0, 0, 1]), np.array([1, 2, 2]), np.array([1, 3, 1]))
    assert sizes.tolist() == [1, 3, 1]
    assert bytes_of_spans("", np.array([], int), np.array([], int), np.array([], int)).tolist() == []


def test_special_tokens_in_a_text_are_text(encoder):
    assert len(spelled(encoder("byte"), "<bos>")) == 5
    assert len(spelled(encoder("byte-level"), "<s>")) == 3
