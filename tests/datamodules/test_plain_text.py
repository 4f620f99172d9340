"""Text is text: no text that spells a special token is given its id, whatever the tokenizer and whoever reads."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.encoder import Encoder
from datamodules.packed_text import PackedTextDataModule
from datamodules.pairs import PairsDataModule
from datamodules.plain_text import plain_backend
from datamodules.tokenizer import build_tokenizer
from models.functional.errors import UsageError

PAD, END, MASK, NEW = "<|pad|>", "<|im_end|>", "<|mask|>", "<|new|>"
SPELLED = [PAD, END, MASK, NEW, "<pad>", "<eos>", "<mask>", "<bos>", "<unk>"]
# what our own tokenizers learn from: a corpus that talks about special tokens
TAUGHT = [f"the {token} of zorro" for token in SPELLED] * 20 + SPELLED * 200
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(**more):
    merges = [("<", "|"), ("|", ">"), ("m", "a"), ("s", "k"), ("ma", "sk"), ("<|", "mask"), ("<|mask", "|>")]
    tokens = [*LETTERS, *(a + b for a, b in merges if a + b != MASK), PAD, END, MASK]
    backend = Tokenizer(models.BPE({token: k for k, token in enumerate(tokens)}, merges, **more))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    return backend


def added_only():
    """A byte-level BPE whose special tokens stand beside the model's vocabulary, as those of chat models do."""
    backend = Tokenizer(models.BPE({token: k for k, token in enumerate(LETTERS)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return backend


def word_level(kind=models.WordLevel, split=pre_tokenizers.WhitespaceSplit):
    words = ["<unk>", "the", "of", "zorro", PAD, END, MASK, *("##" + letter for letter in "zor<>|"), *"zor<>|"]
    backend = Tokenizer(kind({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = split()
    return backend


def unigram():
    pieces = [
        ("<unk>", 0.0),
        (PAD, -1.0),
        (END, -1.0),
        (MASK, -1.0),
        ("▁", -3.0),
        *((c, -4.0) for c in "<|>mask_endpi"),
    ]
    backend = Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return backend


BACKENDS = {
    "BPE with merges": byte_level,
    "BPE that looks words up": lambda: byte_level(ignore_merges=True),
    "BPE with added tokens": added_only,
    "words": word_level,
    "word pieces": lambda: word_level(models.WordPiece),
    "unigram": unigram,
}
OURS = {"byte": 0, "bpe": 600, "small bpe": 200, "phrases": 600, "small words": 40}


def saved(folder, backend, marked=True):
    """The folder of a tokenizer; `marked` tells whether its file says of its special tokens that they are."""
    special = {"pad_token": PAD, "eos_token": END, "mask_token": MASK, "additional_special_tokens": [NEW]}
    if "<unk>" in backend.get_vocab():
        special["unk_token"] = "<unk>"
    if not marked:
        backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in (PAD, END, MASK, NEW)])
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    if not marked:
        described = json.loads((folder / "tokenizer.json").read_text())
        for token in described["added_tokens"]:
            token["special"] = False
        (folder / "tokenizer.json").write_text(json.dumps(described))
    return str(folder)


@pytest.fixture(scope="module", params=[*OURS, *BACKENDS, *(f"{name}, unmarked" for name in BACKENDS)])
def tokenizer(request, tmp_path_factory):
    folder, (name, *unmarked) = tmp_path_factory.mktemp("tokenizer"), request.param.split(", ")
    if name in OURS:
        return build_tokenizer(name.removeprefix("small "), TAUGHT, OURS[name], folder, packed=True)
    return build_tokenizer(saved(folder / "it", BACKENDS[name](), not unmarked), [], 0, folder)


PIECES = st.sampled_from(SPELLED) | st.sampled_from([" ", "\n", "<", "|", "mask", "zorro", "é"]) | st.text(max_size=5)


@given(parts=st.lists(PIECES, max_size=8))
def test_no_text_is_given_the_id_of_a_special_token(tokenizer, parts):
    text = "".join(parts).encode(errors="replace").decode()
    ids = plain_backend(tokenizer).encode(text, add_special_tokens=False).ids
    assert not set(ids) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


@given(
    words=st.lists(st.sampled_from(["the", "of", "zorro", "<", "|", ">", "m", "a", "mask", "5", "?", "\n"]), max_size=8)
)
def test_other_texts_are_encoded_as_ever(tokenizer, words):
    text = " ".join(words)
    own = tokenizer.encode(text, add_special_tokens=False)
    assert plain_backend(tokenizer).encode(text, add_special_tokens=False).ids == own


@pytest.mark.parametrize("name", ["BPE with merges", "BPE that looks words up", "BPE with added tokens"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_text_that_spells_a_special_token_comes_back(name, marked, tmp_path):
    tokenizer = build_tokenizer(saved(tmp_path / "it", BACKENDS[name](), marked), [], 0, tmp_path)
    text = f"the {MASK} of {NEW}zorro{END}"
    ((ids, sizes),) = Encoder(tokenizer)([text])
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=True) == text
    assert sizes.sum() == len(text)


def test_a_special_token_of_one_character_is_still_spelled(tmp_path):
    backend = added_only()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!", pad_token="!").save_pretrained(tmp_path / "it")
    tokenizer = build_tokenizer(str(tmp_path / "it"), [], 0, tmp_path)
    assert len(plain_backend(tokenizer).encode("a!b").ids) == 3


@pytest.mark.filterwarnings("ignore:data.test is not set")
def test_every_datamodule_reads_text_as_text(tmp_path):
    text = f"the {MASK} of {END}zorro"
    rows = "".join(json.dumps({"q": f"{k} {text}", "a": f"{text} {k}"}) + "\n" for k in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    common = {
        "name": "x",
        "train": str(tmp_path / "rows.jsonl"),
        "vocab_size": 0,
        "batch_size": 2,
        "eval_batch_size": 2,
    }
    common |= {"tokenizer": saved(tmp_path / "it", added_only(), marked=False), "cache_dir": tmp_path / "cache"}
    pairs = PairsDataModule(prompt_field="q", response_field="a", mark_prompt_end=False, **common)
    packed = PackedTextDataModule(text_field="a", sequence_length=16, **common)
    for data in (pairs, packed):
        data.setup()
        special = set(data.tokenizer.all_special_ids)
        asked = data.encode_prompts([text])
        prompt = asked["input_ids"][~asked["response_mask"] & asked["attention_mask"]].tolist()
        assert data.tokenizer.decode([k for k in prompt if k not in special]) == text
    columns = pairs.rows["train"].columns
    answers = columns["input_ids"][:, -pairs.response_length :]
    assert pairs.decode_responses(answers)[0].startswith(text)
    assert not (columns["input_ids"] == pairs.tokenizer.mask_token_id).any()
    cache = packed.rows["train"].stream.cache
    assert set(cache.tokens.tolist()) & special == {packed.bos_id}
    assert (cache.tokens == packed.bos_id).sum() == 20
    ids = columns["row_index"]
    scores = pairs.scorer({"row_index": ids}, answers)
    assert scores.quality["exact_match"] == 1.0


def test_a_tokenizer_without_a_backend_of_its_own_is_refused(tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "it")
    with pytest.raises(UsageError, match="holds a ByT5Tokenizer"):
        build_tokenizer(str(tmp_path / "it"), [], 0, tmp_path)
