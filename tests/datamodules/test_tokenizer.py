import re
from itertools import pairwise

import pytest
from helpers.dream import write_dream
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from datamodules.pairs import PairsDataModule
from datamodules.tokenizer import LONGEST_WORD, build_tokenizer, trainable_parts
from models.functional.errors import UsageError

COMMANDS = ["jump left twice", "walk around right", "turn opposite left and walk"] * 5
ACTIONS = ["I_JUMP I_TURN_LEFT I_JUMP", "I_WALK I_TURN_RIGHT I_WALK", "I_TURN_LEFT I_TURN_LEFT I_WALK"] * 5
HARD_TEXTS = ["", " two  spaces ", "Café £30 日本語 🦘", "tab\tand\nnewline\r\n\x00", "don't stop, near. <mask> <eos>"]


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(("kind", "vocab_size"), [("byte", 0), ("bpe", 512)])
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_every_text_comes_back_exactly(kind, vocab_size, text, tmp_path):
    tokenizer = build_tokenizer(kind, COMMANDS + ACTIONS, vocab_size, tmp_path)
    assert tokenizer.decode(ids(tokenizer, text)) == text
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=True) == text


def test_bytes_are_one_token_each(tmp_path):
    tokenizer = build_tokenizer("byte", [], 0, tmp_path)
    assert len(tokenizer) == 256 + 3
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, 2)
    assert len(ids(tokenizer, "日本 é")) == len("日本 é".encode())


def test_special_tokens_are_not_part_of_the_text(tmp_path):
    tokenizer = build_tokenizer("byte", [], 0, tmp_path)
    text = ids(tokenizer, "<mask>")
    assert tokenizer.mask_token_id not in text
    framed = [tokenizer.pad_token_id, *text, tokenizer.eos_token_id]
    assert tokenizer.decode(framed, skip_special_tokens=True) == "<mask>"


@pytest.mark.parametrize("vocab_size", [128, 512])
def test_bpe_needs_one_token_per_action(vocab_size, tmp_path):
    tokenizer = build_tokenizer("bpe", COMMANDS + ACTIONS, vocab_size, tmp_path)
    assert [len(ids(tokenizer, text)) for text in ACTIONS] == [len(text.split()) for text in ACTIONS]


def test_a_small_bpe_spells_the_training_texts_and_marks_other_bytes(tmp_path):
    tokenizer = build_tokenizer("bpe", COMMANDS + ACTIONS, 64, tmp_path)
    assert len(tokenizer) <= 64
    assert all(tokenizer.decode(ids(tokenizer, text)) == text for text in COMMANDS + ACTIONS)
    assert ids(tokenizer, "é") == [tokenizer.unk_token_id] * 2


def test_words_come_back_with_single_spaces_and_unknown_ones_marked(tmp_path):
    tokenizer = build_tokenizer("words", COMMANDS + ACTIONS, 64, tmp_path)
    assert tokenizer.decode(ids(tokenizer, "jump  left\ttwice ")) == "jump left twice"
    assert ids(tokenizer, "jump sideways")[1] == tokenizer.unk_token_id
    assert len(build_tokenizer("words", COMMANDS + ACTIONS, 6, tmp_path)) == 6


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_training_happens_once_per_content(kind, tmp_path, monkeypatch):
    first = build_tokenizer(kind, COMMANDS, 100, tmp_path)
    monkeypatch.setattr("datamodules.tokenizer._train_bpe", pytest.fail)
    monkeypatch.setattr("datamodules.tokenizer._train_words", pytest.fail)
    again = build_tokenizer(kind, list(COMMANDS), 100, tmp_path)
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert ids(again, "<mask> jump") == ids(first, "<mask> jump")
    monkeypatch.undo()
    # Other texts, another size and other cuts of the same letters are other tokenizers.
    build_tokenizer(kind, COMMANDS[:-1], 100, tmp_path)
    build_tokenizer(kind, COMMANDS, 99, tmp_path)
    build_tokenizer(kind, [COMMANDS[0] + COMMANDS[1], *COMMANDS[2:]], 100, tmp_path)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert len(folders) == 4
    assert not any(name.startswith(".") for name in folders)


def test_a_run_that_finds_the_tokenizer_finished_by_another_uses_it(tmp_path, monkeypatch):
    def replaced_by_another(source, target):
        first.save_pretrained(target)
        raise OSError("Directory not empty")

    first = build_tokenizer("bpe", COMMANDS, 100, tmp_path / "one")
    monkeypatch.setattr("datamodules.tokenizer.os.replace", replaced_by_another)
    second = build_tokenizer("bpe", COMMANDS, 100, tmp_path / "two")
    assert second.get_vocab() == first.get_vocab()
    assert len(list((tmp_path / "two").iterdir())) == 1


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"data\.vocab_size=10 is too small"):
        build_tokenizer("bpe", COMMANDS, 10, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_cache_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"type data\.cache_dir=FOLDER"):
        build_tokenizer("bpe", COMMANDS, 100, tmp_path / "file")


# -- folders ---------------------------------------------------------------------------------------------------------


def saved_tokenizer(folder, **special):
    backend = Tokenizer(models.WordLevel({"jump": 0, **{token: i + 1 for i, token in enumerate(special.values())}}))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


def test_a_local_folder_is_read(tmp_path):
    folder = saved_tokenizer(tmp_path, pad_token="[PAD]", eos_token="[EOS]", mask_token="[MASK]")
    tokenizer = build_tokenizer(folder, [], 0, tmp_path)
    assert (tokenizer.pad_token, tokenizer.mask_token_id) == ("[PAD]", 3)


def test_the_tokenizer_of_dream_is_read_without_its_code(tmp_path):
    """Its code is that of Qwen2: bytes of text in the form NFC, and merges."""
    found = build_tokenizer(str(write_dream(tmp_path)), [], 0, tmp_path)
    assert (len(found), found.mask_token_id, found.eos_token_id, found.pad_token_id) == (262, 261, 257, 257)
    assert ids(found, "he")[:1] == [256]
    assert ids(found, "e\u0301") == ids(found, "\u00e9")
    assert found.decode(ids(found, "he 12 é")) == "he 12 é"


def test_a_folder_without_a_mask_serves_models_that_need_none(tmp_path):
    own, folder = build_tokenizer("byte", [], 0, tmp_path), str(tmp_path / "maskless")
    own.mask_token = None
    own.save_pretrained(folder)
    assert build_tokenizer(folder, [], 0, tmp_path).mask_token_id is None
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(f'{{"q": "jump {k}", "a": "I_JUMP {k}"}}' for k in range(40)))
    data = PairsDataModule(
        name="jumps", train=str(rows), prompt_field="q", response_field="a", tokenizer=folder, vocab_size=64,
        batch_size=4, eval_batch_size=4, cache_dir=tmp_path,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="data.test is not set, so the test figures are those of the val split"):
        data.setup()
    asked = data.encode_prompts(["jump 3"])
    assert (asked["input_ids"][asked["response_mask"]] == data.tokenizer.eos_token_id).all()
    with pytest.raises(UsageError, match="different vocabularies"):
        data.check_network("model", 10_000, 7, 512)


def test_a_tokenizer_without_padding_pads_with_end_of_text(tmp_path):
    folder = saved_tokenizer(tmp_path / "it", eos_token="[EOS]", mask_token="[MASK]")
    tokenizer = build_tokenizer(folder, [], 0, tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert len(tokenizer) == 3


@pytest.mark.parametrize(("packed", "missing"), [(False, "eos_token"), (True, "bos_token")])
def test_the_advice_for_a_tokenizer_without_a_needed_token_needs_no_new_id(packed, missing, tmp_path):
    folder = saved_tokenizer(tmp_path / "it", mask_token="[MASK]")
    with pytest.raises(UsageError, match=rf"data\.tokenizer=.*it: .* {missing} .*tokenizer\.{missing} = "):
        build_tokenizer(folder, [], 0, tmp_path, packed=packed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    setattr(tokenizer, missing, "jump")
    tokenizer.save_pretrained(folder)
    assert len(build_tokenizer(folder, [], 0, tmp_path, packed=packed)) == 2


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"data\.tokenizer=gpt2 is neither byte, bpe, phrases or words nor a folder"):
        build_tokenizer("gpt2", [], 0, tmp_path)
    with pytest.raises(UsageError, match="no tokenizer could be read"):
        build_tokenizer(str(tmp_path), [], 0, tmp_path)


@pytest.mark.parametrize("split", [True, False])
def test_no_word_that_merges_are_learned_from_is_long(split):
    """Training takes the square of its length: minutes for a line of DNA."""
    usual = ["I_TURN_LEFT " * 400, "two words\n" * 900, "short", ""]
    odd = [
        "ACGT" * 3000,
        "x" * 5001,
        "x" * 4000 + " c",
        "a" + " " * 2500,
        " " * 4500,
        "a " + "b" * 2500 + " c",
        "日" * 2001,
        "y" * 1999 + "\n" + "z" * 1999,
    ]
    for text in usual + odd:
        parts = list(trainable_parts([text], split=split))
        assert "".join(parts) == text
        words = [word for part in parts for word in re.findall(r"\S+|\s+", part)] if split else parts
        assert max(map(len, words), default=0) <= LONGEST_WORD
    if split:  # all others stay as they are
        assert list(trainable_parts(usual, split=True)) == [text for text in usual if text] + [""]
        assert list(trainable_parts(["a " + "b" * 2500 + " c"], split=True)) == ["a " + "b" * 2000, "b" * 500 + " c"]
        for text in usual + odd:  # cut after each 2000 characters of a word
            cuts = [found.end() for found in re.finditer(r"\S{2000}|\s{2000}", text)]
            parts = [text[a:b] for a, b in pairwise([0, *cuts, len(text)]) if a < b or not text]
            assert list(trainable_parts([text], split=True)) == parts or len(text) <= LONGEST_WORD
    else:
        assert list(trainable_parts(["one\n" * 600], split=False)) == ["one\n" * 500, "one\n" * 100]
    assert list(trainable_parts(["x" * LONGEST_WORD], split=split)) == ["x" * LONGEST_WORD]


@pytest.mark.parametrize("kind", ["bpe", "phrases"])
def test_a_text_without_spaces_trains_a_tokenizer(kind, tmp_path):
    text = "ACGT" * 100_000
    tokenizer = build_tokenizer(kind, [text], 300, tmp_path)
    assert tokenizer.decode(tokenizer(text[:50])["input_ids"]) == text[:50]
