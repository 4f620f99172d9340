"""Tokenizers of a text corpus: bytes, a trained byte-level BPE, phrases, whole words, or a local Hugging Face folder.

Our own tokenizers put `<pad> <eos> <mask>` (then `<bos>` for packed text and `<unk>` where they are needed) at ids 0, 1, 2 ...
They add nothing when encoding. A corpus encodes with `datamodules.plain_text`, so that a text that happens to contain "<mask>"
is those six characters, never the mask token.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from models.functional.errors import UsageError

SPECIAL_TOKENS = ["<pad>", "<eos>", "<mask>"]
BEGINNING = "<bos>"
UNKNOWN = "<unk>"
TRAINED = ("bpe", "phrases", "words")  # made from the texts
GENERATION = "generation_config.json"  # of the model in the tokenizer's folder
# a folder of save_pretrained has at least one of them
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)

# a tokenizer that is published as code beside its model -> the class of transformers that does the same with its files
READERS = {"DreamTokenizer": Qwen2Tokenizer}

# From this size on a BPE vocabulary holds all 256 bytes, so that it can spell any text; a smaller one could not afford
# them and holds only the bytes of the training texts.
FULL_ALPHABET_FROM = 512

# GPT-2's split with the underscore counted as a letter: a name such as I_TURN_LEFT can then become one token.
WORDS_AND_SIGNS = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}_]+| ?\p{N}+| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"

# Characters of a word that BPE learns merges from, such as a line of DNA or Base64.
LONGEST_WORD = 2000
# looked for at the beginning of a word alone: elsewhere the end of each word would be read again from each of its letters
LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD},}}|(?<!\s)\s{{{LONGEST_WORD},}}")

# Part of the cache key: raise it when the construction below changes.
CACHE_LAYOUT = 1


def build_tokenizer(
    kind: str,
    texts: Iterable[str],
    vocab_size: int,
    cache_dir: str | os.PathLike,
    *,
    packed: bool = False,
    option: str = "data.tokenizer",
) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `data.tokenizer=kind` asks for.

    kind: `byte` (exact on any text; vocab_size is not used), `bpe`, `phrases` (BPE whose merges run across spaces, as in
        SuperBPE, Liu et al. 2025: formulaic texts become a few tokens), `words` (split at white space, decoded with single
        spaces), or the path of a folder that a Hugging Face `save_pretrained` wrote (vocab_size is not used).
    texts: what `bpe`, `phrases` and `words` are trained on, iterated more than once; the result is kept in cache_dir under
        the hash of its inputs.
    vocab_size: at most this many tokens, special tokens included; `bpe` and `phrases` spell every text exactly from 512
        on, below that a byte that is not in the training texts becomes `<unk>`.
    packed: for a stream of documents: our own tokenizers have `<bos>` too, and a folder needs no more than a token that can
        precede a document (see `document_start`).
    option: what `kind` is the value of, as errors about a folder name it.

    Raises UsageError for a folder that does not exist or has no usable tokenizer, and for a too small vocab_size.
    """
    special = [*SPECIAL_TOKENS, BEGINNING] if packed else SPECIAL_TOKENS
    if kind == "byte":
        return _with_special_tokens(_byte_level(models.BPE(_byte_vocabulary(special), []), split=False), special)
    if kind in TRAINED:
        return _trained(kind, texts, vocab_size, Path(cache_dir).expanduser(), special)
    tokenizer = _from_folder(kind, option)
    if packed:
        document_start(tokenizer, f"{option}={kind}")
    else:
        require_end_token(tokenizer, f"{option}={kind}")
        if tokenizer.pad_token_id is None:
            # Padding is never attended to, so any token serves. A new one would be outside the vocabulary of the model.
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fixed_kind(kind: str, vocab_size: int) -> dict[str, Any]:
    """The options that decide which tokenizer is made from the same texts."""
    if kind in TRAINED:
        return {"tokenizer": kind, "vocab_size": vocab_size}
    return {"tokenizer": kind if kind == "byte" else str(Path(os.path.expanduser(kind)).resolve())}


def document_start(tokenizer: PreTrainedTokenizerFast, where: str = "data.tokenizer") -> int:
    """The id before every document of a packed stream: `<bos>`, or end-of-text where there is none (GPT-2)."""
    for number in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if number is not None:
            return number
    raise UsageError(
        f"{where}: the tokenizer has neither a bos_token nor an eos_token to put before documents; "
        + _name_a_token("bos_token")
    )


def require_end_token(tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    """Raise UsageError for a tokenizer without the end-of-text token that every method here needs.

    A mask is for the networks that know one to ask for (`check_network`): causal models need none.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError(f"{where}: the tokenizer has no eos_token to end a text with; " + _name_a_token("eos_token"))


def _name_a_token(name: str) -> str:
    """How to give a tokenizer a special token without a new id, which its model would not know."""
    return (
        f"choose one of its tokens (tokenizer.{name} = '<|endoftext|>', or the one that its model was trained with, then "
        "tokenizer.save_pretrained(FOLDER)), or type data.tokenizer=bpe for a model that is trained here"
    )


def keep_further_ends(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write what `further_ends` reads into a folder that the tokenizer is saved in."""
    if ends := further_ends(tokenizer):
        (folder / GENERATION).write_text(json.dumps({"eos_token_id": sorted(ends)}) + "\n")


def further_ends(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The ids at which its model ends a text, of the generation_config.json in the tokenizer's folder.

    A chat model ends a turn with one token and a document with another; the tokenizer names only one of them.
    """
    try:
        ends = json.loads(Path(tokenizer.name_or_path, GENERATION).read_text())["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {ends} if isinstance(ends, int) else set(ends or ())


# -- training, once per content --------------------------------------------------------------------------------------


def _trained(
    kind: str, texts: Iterable[str], vocab_size: int, cache_dir: Path, special: list[str]
) -> PreTrainedTokenizerFast:
    folder = cache_dir / f"{kind}-{vocab_size}-{_content_hash(kind, texts, vocab_size, special)[:16]}"
    if not (folder / "tokenizer.json").is_file():
        train = _train_words if kind == "words" else partial(_train_bpe, split=kind == "bpe")
        tokenizer = train(texts, vocab_size, special)
        if len(tokenizer) > vocab_size:
            raise UsageError(
                f"data.vocab_size={vocab_size} is too small for data.tokenizer={kind}: the special tokens and the "
                f"bytes of the training texts alone are {len(tokenizer)}; type data.vocab_size={2 * len(tokenizer)}"
            )
        _save_atomically(tokenizer, folder)
    # Loaded even right after training, so that every process of a run reads the very same bytes.
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _train_bpe(texts: Iterable[str], vocab_size: int, special: list[str], *, split: bool) -> PreTrainedTokenizerFast:
    full = vocab_size >= FULL_ALPHABET_FROM
    special = special if full else [*special, UNKNOWN]
    backend = _byte_level(models.BPE() if full else models.BPE(unk_token=UNKNOWN), split=split)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if full else [],
        show_progress=False,
    )
    backend.train_from_iterator(trainable_parts(texts, split=split), trainer)
    return _with_special_tokens(backend, special)


def trainable_parts(texts: Iterable[str], *, split: bool) -> Iterator[str]:
    """The texts in parts that hold no word of more than LONGEST_WORD characters: training takes the square of its length.

    split: whether a word ends with its letters; without, all of a part is one. Shorter texts and words stay as they are.
    """
    for text in texts:
        if len(text) <= LONGEST_WORD:
            yield text
            continue
        start = 0
        if split:
            for run in LONG_RUN.finditer(text):
                for end in range(run.start() + LONGEST_WORD, run.end() + 1, LONGEST_WORD):
                    yield text[start:end]
                    start = end
        while not split and len(text) - start > LONGEST_WORD:
            end = max(text.rfind(mark, start, start + LONGEST_WORD) for mark in "\n ") + 1
            end = end if end > start else start + LONGEST_WORD
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:]


def _train_words(texts: Iterable[str], vocab_size: int, special: list[str]) -> PreTrainedTokenizerFast:
    special = [*special, UNKNOWN]
    # Without a decoder, tokens are joined with single spaces: just what words need.
    backend = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return _with_special_tokens(backend, special)


def _content_hash(kind: str, texts: Iterable[str], vocab_size: int, special: list[str]) -> str:
    beyond = "".join(f" {token}" for token in special[len(SPECIAL_TOKENS) :])
    digest = hashlib.sha256(f"{CACHE_LAYOUT} {kind} {vocab_size}{beyond}\n".encode())
    for text in texts:
        data = text.encode()
        # The length keeps ["ab", "c"] and ["a", "bc"] apart.
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()


def _save_atomically(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    unfinished = folder.with_name(f".unfinished-{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        tokenizer.save_pretrained(unfinished)
        os.replace(unfinished, folder)
    except OSError as error:
        # Another process may have finished the same tokenizer in the meantime, which is just as good.
        if not (folder / "tokenizer.json").is_file():
            raise UsageError(
                f"the trained tokenizer cannot be written to {folder} ({error}); "
                f"type data.cache_dir=FOLDER with a folder that you can write to"
            ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# -- construction ----------------------------------------------------------------------------------------------------


def _byte_vocabulary(special: list[str]) -> dict[str, int]:
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: number for number, token in enumerate(tokens)}


def _byte_level(model: models.BPE, *, split: bool) -> Tokenizer:
    backend = Tokenizer(model)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(WORDS_AND_SIGNS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes]) if split else to_bytes
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_special_tokens(backend: Tokenizer, special: list[str]) -> PreTrainedTokenizerFast:
    names = dict(zip(SPECIAL_TOKENS, ("pad_token", "eos_token", "mask_token"), strict=True))
    names |= {BEGINNING: "bos_token", UNKNOWN: "unk_token"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, split_special_tokens=True, **{names[token]: token for token in special}
    )


def _from_folder(kind: str, option: str) -> PreTrainedTokenizerFast:
    folder = Path(os.path.expanduser(kind))
    if not os.path.isdir(folder):
        raise UsageError(
            f"{option}={kind} is neither byte, bpe, phrases or words nor a folder (looked for {folder.absolute()}); "
            f"type {option}=bpe, or fetch one with `hf download NAME --local-dir FOLDER` "
            f"and type {option}=FOLDER"
        )
    # transformers 5.5 answers a folder of a model alone with a tokenizer of special tokens only
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise _no_tokenizer(kind, option, f"it has no {TOKENIZER_FILES[0]}")
    reader = READERS.get(_class_of(folder), AutoTokenizer)
    try:
        tokenizer = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a folder that it cannot read
        raise _no_tokenizer(kind, option, next(iter(str(error).splitlines()), type(error).__name__)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UsageError(
            f"{option}={kind} holds a {type(tokenizer).__name__}, which has no tokenizer.json; "
            f"type {option}=bpe or the folder of a fast tokenizer"
        )
    # BERT names the ends of a text [CLS] and [SEP]
    for name, own in (("bos_token", tokenizer.cls_token), ("eos_token", tokenizer.sep_token)):
        if getattr(tokenizer, name) is None and own is not None:
            setattr(tokenizer, name, own)
    return tokenizer


def _class_of(folder: Path) -> str:
    """The class that tokenizer_config.json names; empty where it names none or cannot be read."""
    try:
        return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def end_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The tokens at which a text ends: the tokenizer's own, which fills what is beyond, then those of its model."""
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *sorted(further_ends(tokenizer))]))


def _no_tokenizer(kind: str, option: str, reason: str) -> UsageError:
    return UsageError(
        f"{option}={kind}: no tokenizer could be read from this folder ({reason}); type the folder of one that "
        "tokenizer.save_pretrained(FOLDER) wrote, with a tokenizer.json in it"
    )
