"""The packed corpus from files to batches: the text comes back, nothing is tokenised twice, memory stays bounded."""

import functools
import gzip
import inspect
import json
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules import documents, token_cache
from datamodules.encoder import Encoder
from datamodules.packed_text import PackedTextDataModule, split_documents
from models.backbones.llada import build_llada
from models.functional.bits_per_byte import NllSums, bits_per_byte, nll_sums, perplexity, token_nll
from models.functional.errors import UsageError

ROOT = Path(__file__).parents[2]
TEXTS = [f"Café {k}: {'日本語 🦘 ' * (k % 4)}{k * k} jumps, twice.\n" for k in range(60)]
TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
    "rope_theta": 100.0,
}


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def save_byte_level(folder, **special) -> str:
    """A folder as a GPT-2 has it, without merges."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def build(tmp_path):
    """A function that makes a set-up datamodule; texts given as lists are written to files first."""

    def make(setup=True, **options):
        options = {"train": TEXTS, **options}
        for split in ("train", "val", "test"):
            if isinstance(options.get(split), list):
                options[split] = write(tmp_path / f"{split}.jsonl", options[split])
        defaults = {
            "name": "packed",
            "tokenizer": "byte",
            "vocab_size": 600,
            "sequence_length": 16,
            "batch_size": 4,
            "eval_batch_size": 4,
            "cache_dir": tmp_path / "cache",
        }
        data = PackedTextDataModule(**{**defaults, **options})
        if setup:
            data.setup("fit")
        return data

    return make


def stream_of(data, split):
    """(tokens, bytes of each) of one pass over a split, from its rows."""
    rows = data.rows[split]
    batches = [rows[row] for row in range(len(rows.stream) // data.sequence_length)]
    return [torch.cat([batch[name] for batch in batches]).tolist() for name in ("input_ids", "target_bytes")]


def texts_of(data, split):
    """The documents of a split as text, read from the batches of one pass; only for its first and last rows cut."""
    tokens = [data.bos_id]
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    for batch in loader:
        tokens += batch["labels"].flatten().tolist()
    edges = [k for k, token in enumerate(tokens) if token == data.bos_id] + [len(tokens)]
    return [data.tokenizer.decode(tokens[a + 1 : b]) for a, b in pairwise(edges)]


# -- the text comes back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "phrases"])
@pytest.mark.parametrize("passage", [7, 2**18])
def test_the_documents_come_back_from_the_batches(build, tokenizer, passage, monkeypatch):
    monkeypatch.setattr(documents, "PASSAGE", passage)
    monkeypatch.setattr(token_cache, "BATCH", 50)
    data = build(val=TEXTS, test=TEXTS[:9], tokenizer=tokenizer, sequence_length=13)
    assert texts_of(data, "val") == TEXTS
    assert texts_of(data, "test") == TEXTS[:9]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "words"])
def test_targets_of_a_document_stand_for_all_its_bytes(build, tokenizer):
    data = build(val=TEXTS, test=TEXTS, tokenizer=tokenizer, vocab_size=300 if tokenizer == "words" else 600)
    cache = data.rows["val"].stream.cache
    sums = np.add.reduceat(cache.target_bytes.astype(int), cache.starts)
    assert sums.tolist() == [len(text.encode()) for text in TEXTS]
    assert (cache.tokens[cache.starts] == data.bos_id).all()
    assert (cache.target_bytes[cache.starts] == 0).all()
    targets = sum(int(batch["target_bytes"].sum()) for batch in data.val_dataloader())
    assert targets == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "phrases", "words", "folder"])
def test_bits_per_byte_of_a_uniform_model_by_hand(build, tokenizer, tmp_path):
    kind = save_byte_level(tmp_path / "folder", eos_token="<|endoftext|>") if tokenizer == "folder" else tokenizer
    data = build(val=TEXTS, test=TEXTS, tokenizer=kind, vocab_size=512)
    vocabulary = len(data.tokenizer)
    pieces = sum(len(data.tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS)
    parts = [
        nll_sums(token_nll(torch.zeros(*batch["labels"].shape, vocabulary), batch["labels"]), batch["target_bytes"])
        for batch in data.val_dataloader()
    ]
    sums = functools.reduce(NllSums.plus, parts)
    expected = pieces * math.log2(vocabulary) / len("".join(TEXTS).encode())
    assert bits_per_byte(sums).item() == pytest.approx(expected, rel=1e-6)
    assert perplexity(sums).item() == pytest.approx(vocabulary, rel=1e-5)
    assert sums.tokens == pieces + len(TEXTS) - 1  # the first <bos> is no target


def test_batches_have_the_promised_columns(build):
    for mask in (False, True):
        data = build(val=TEXTS, test=TEXTS, document_mask=mask)
        for loader in (data.train_dataloader(), data.val_dataloader()):
            batch = next(iter(loader))
            more = ["document_ids", "position_ids"] if mask else []
            assert list(batch) == ["input_ids", "labels", "target_bytes", *more]
            assert {(column.shape, column.dtype) for column in batch.values()} == {((4, 16), torch.int64)}
            assert all(column.is_contiguous() for column in batch.values())
            assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


def test_a_hub_name_is_read_as_any_file(build, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": TEXTS, "other": list(range(len(TEXTS)))})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("some/name", "validation"): rows}[name, split])
    data = build(val="hub:some/name:validation", test=("hub:some/name:validation",))
    assert texts_of(data, "val") == texts_of(data, "test") == TEXTS
    assert data.rows["val"].stream.cache.folder == data.rows["test"].stream.cache.folder


# -- splits ----------------------------------------------------------------------------------------------------------


def test_documents_are_held_out_by_the_seed_and_copies_stay_together(build):
    repeated = [*TEXTS, *TEXTS[::-1], TEXTS[0]]
    data = build(train=repeated, val_fraction=0.2, test_fraction=0.1)
    parts = {split: texts_of(data, split) for split in ("val", "test")}
    assert (len(set(parts["val"])), len(set(parts["test"]))) == (12, 6)
    assert len(parts["val"]) >= 24
    assert set(parts["val"]).isdisjoint(parts["test"])
    counts = {split: rows.stream.documents for split, rows in data.rows.items()}
    assert sum(counts.values()) == 121
    assert len(stream_of(data, "train")[0]) > 16 * data.batch_size
    assert texts_of(build(train=repeated, val_fraction=0.2, test_fraction=0.1), "val") == parts["val"]
    assert texts_of(build(train=repeated, val_fraction=0.2, test_fraction=0.1, seed=1), "val") != parts["val"]


def test_no_document_is_in_two_splits_and_none_in_no_split():
    hashes = np.random.default_rng(0).permutation(np.arange(200, dtype=np.uint64) % 40)
    parts = split_documents(hashes, {"val": 0.1, "test": 0.01}, 3)
    assert sum(parts.values()).tolist() == [1] * 200
    assert [len(set(hashes[parts[split]])) for split in ("train", "val", "test")] == [35, 4, 1]
    with pytest.raises(
        UsageError, match=r"too few different documents \(2\).*data\.val=FILE and data\.test=FILE.*data\.cut=line"
    ):
        split_documents(hashes[:1].repeat(9) + np.arange(9) % 2, {"val": 0.1, "test": 0.1}, 0)


# -- once, and by content --------------------------------------------------------------------------------------------


def test_nothing_is_tokenised_twice(build, monkeypatch, tmp_path):
    first = build(tokenizer="bpe")
    monkeypatch.setattr(Encoder, "__call__", pytest.fail)
    again = build(tokenizer="bpe", seed=5, sequence_length=8)
    assert again.rows["train"].stream.cache.folder == first.rows["train"].stream.cache.folder
    # the same content elsewhere
    (tmp_path / "b").mkdir()
    os.rename(tmp_path / "train.jsonl", tmp_path / "b" / "other.jsonl")
    build(train=str(tmp_path / "b" / "other.jsonl"), tokenizer="bpe")
    monkeypatch.undo()
    folders = {first.rows["train"].stream.cache.folder}
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    for options in (
        {"train": TEXTS[:-1]},
        {"tokenizer": "byte"},
        {"tokenizer": "phrases"},
        {"train": str(tmp_path / "texts.txt"), "cut": "line"},
        {"train": str(tmp_path / "texts.txt"), "cut": "blank_line"},
    ):
        data = build(**{"tokenizer": "bpe", **options})
        folders.add(data.rows["train"].stream.cache.folder)
    assert len(folders) == 6
    left = {path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()}
    assert left == {"", ".lock"}
    assert not list((tmp_path / "cache" / "tokens").glob(".unfinished*"))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_of_other_content_is_read_again_whatever_its_size_and_time(build, tmp_path, replaced):
    path = Path(write(tmp_path / "a.jsonl", TEXTS))
    before, first = path.stat(), build(train=str(path), val=TEXTS[:3])
    other = Path(write(tmp_path / "b.jsonl", [*TEXTS[1:], TEXTS[0]]))
    if replaced:
        other.replace(path)
    else:
        path.write_bytes(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = build(train=str(path), val=TEXTS[:3])
    assert second.fingerprint() != first.fingerprint()
    assert stream_of(second, "train") != stream_of(first, "train")


def test_an_interrupted_tokenising_leaves_nothing_that_is_found(build, monkeypatch, tmp_path):
    encode, calls = Encoder.__call__, []

    def interrupted(self, texts):
        calls.append(texts)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(token_cache, "BATCH", 100)
    monkeypatch.setattr(Encoder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]
    # a killed run cannot clean up: what it left is no obstacle
    (lock,) = (tmp_path / "cache" / "tokens").glob("*.lock")
    left = lock.with_name(f".unfinished-{lock.stem}")
    left.mkdir()
    (left / "tokens.bin").write_text("half")
    monkeypatch.undo()
    assert texts_of(build(val=TEXTS), "val") == TEXTS
    assert not left.exists()


def test_those_that_start_together_tokenise_once(build, monkeypatch, tmp_path):
    encode, calls = Encoder.__call__, []
    monkeypatch.setattr(Encoder, "__call__", lambda self, texts: calls.append(1) or encode(self, texts))
    datamodules = [build(setup=False, train=write(tmp_path / "a.jsonl", TEXTS)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(PackedTextDataModule.setup, datamodules))
    assert len(calls) == 1
    assert len({data.fingerprint() for data in datamodules}) == 1


def test_fingerprint_follows_training_rows_and_vocabulary(build):
    same = {"val": TEXTS[:5], "test": TEXTS[:5]}
    first = build(**same).fingerprint()
    assert build(**{**same, "test": TEXTS[:9]}, setup=False, batch_size=3).fingerprint() == first
    assert build(**same, sequence_length=8).fingerprint() != first
    assert build(**same, tokenizer="bpe").fingerprint() != first
    assert build().fingerprint() != first
    assert build(seed=1).fingerprint() != build().fingerprint()


# threads and arrow's own pool reserve memory that they never touch
FRUGAL = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0", "ARROW_DEFAULT_MEMORY_POOL": "system"}
BOUNDED = """
import resource, sys
import pyarrow
from datamodules.packed_text import PackedTextDataModule

path, cache_dir, spare, kind = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
with open("/proc/self/status") as status:
    now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + spare, now + spare))
try:
    open(path, "rb").read()
except MemoryError:
    print("the corpus does not fit")
sizes = dict(sequence_length=64, batch_size=4, eval_batch_size=4, vocab_size=600, tokenizer_megabytes=1)
data = PackedTextDataModule(name="big", train=path, cut="line", tokenizer=kind, cache_dir=cache_dir, **sizes)
data.setup()
print("tokens", next(iter(data.train_dataloader()))["labels"].numel(), len(data.rows["train"].stream))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and counts memory as Linux does")
@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [
        pytest.param("txt", "byte", marks=pytest.mark.slow),
        pytest.param("txt", "bpe", marks=pytest.mark.slow),
        pytest.param("parquet", "byte", marks=pytest.mark.slow),
    ],
)
def test_a_corpus_larger_than_memory(tmp_path, kind, tokenizer):
    spare, draw = 64 * 2**20, random.Random(0)
    path = tmp_path / f"big.{kind}"
    texts = [f"{draw.random()} jumps over the lazy dog, " * 40 for _ in range(spare // 1500)]
    if kind == "txt":
        path.write_text("\n".join(texts))
    else:  # one row group
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="none", use_dictionary=False)
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(path), str(tmp_path / "cache"), str(spare), tokenizer],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | FRUGAL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the corpus does not fit" in done.stdout
    tokens = int(done.stdout.split()[-1])
    assert tokens > (0.8 * spare if tokenizer == "byte" else 0.1 * spare)


# -- what cannot work ------------------------------------------------------------------------------------------------


def test_unusable_lines_are_counted_and_named_each_time(build, tmp_path):
    path = Path(write(tmp_path / "a.jsonl", TEXTS))
    path.write_bytes(path.read_bytes() + b'{broken\n{"text": "\xff"}\n')
    for _ in range(2):  # the second time from the cache
        with pytest.warns(
            UserWarning, match=r"(?s)data\.train: 2 unusable.*a\.jsonl:61: not JSON.*a\.jsonl:62: bad UTF-8"
        ):
            build(train=str(path))


def test_unknown_tokens_are_warned_of(build):
    with pytest.warns(UserWarning, match=r"data\.val: 4 of .* tokens are unknown.*data\.tokenizer=byte"):
        build(train=["a b c d e f " * 9] * 3, val=["a £ж b"], test=["a b"], tokenizer="bpe", vocab_size=40)


def test_options_that_cannot_work_are_named(build, tmp_path):
    def refuses(message, **options):
        with pytest.raises(UsageError, match=message):
            build(**options)

    refuses(r"data\.train=nowhere\.txt does not exist", train="nowhere.txt")
    refuses(r"data\.train is not set", train=None)
    refuses(r"data\.sequence_length=0 must be at least 1", sequence_length=0)
    refuses(r"data\.batch_size=0 must be at least 1", batch_size=0)
    refuses(r"data\.val_fraction=1\.5 must lie between 0 and 1", val_fraction=1.5)
    refuses(r"data\.tokenizer=gpt2 is neither", tokenizer="gpt2")
    refuses(r"the train split has .* tokens, fewer than one row; type data\.sequence_length=", sequence_length=10**6)
    refuses(r"too few different documents \(1\)", train=TEXTS[:1] * 3)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refuses(r"(?s)data\.val has no document; 1 lines or files.*empty\.txt: the file is empty", val=str(empty))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-10])
    refuses(r"data\.train: .*cut\.jsonl\.gz cannot be read", train=str(tmp_path / "cut.jsonl.gz"))
    refuses(r"has no field 'body'; type data\.text_field=NAME", text_field="body")
    (tmp_path / "file").write_text("")
    refuses(r"the tokens of data\.train cannot be kept in .*type data\.cache_dir=FOLDER", cache_dir=tmp_path / "file")


def test_a_file_that_changes_while_it_is_read_is_refused(build, monkeypatch, tmp_path):
    encode, path = Encoder.__call__, write(tmp_path / "a.jsonl", TEXTS)

    def meanwhile(self, texts):
        with open(path, "a") as file:
            file.write('{"text": "more"}\n')
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "__call__", meanwhile)
    with pytest.raises(UsageError, match="has changed while it was read"):
        build(train=path)


def test_a_network_must_fit_the_rows_and_the_vocabulary(build):
    data = build()
    assert data.special_ids() == {"vocab_size": 260, "mask_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    assert (data.bos_id, data.prompt_length, data.response_length, data.controls()) == (3, 0, 16, [])
    data.check_network("model", 260, 2, 16)
    data.check_network("model", 300, None, 99)
    with pytest.raises(UsageError, match=r"need 16 positions, the model has 8; shorten data\.sequence_length"):
        data.check_network("model", 260, 2, 8)
    for vocabulary, mask in ((259, 2), (260, 7)):
        with pytest.raises(UsageError, match="different vocabularies"):
            data.check_network("model", vocabulary, mask, 16)
    assert data.facts()["bytes_per_token"] == 1.0


@pytest.mark.parametrize("sequence_length", [1, 8, 16])
def test_a_prompt_must_fit_the_network_with_what_follows_it(build, sequence_length):
    data = build(sequence_length=sequence_length)
    for prompt in ("", "a" * (16 - sequence_length)):  # with <bos>; the last token of the response is not read
        data.encode_prompts(["", prompt])
        data.check_network("model", 260, 2, 16)
    data.encode_prompts(["a" * (17 - sequence_length)])
    data.encode_prompts([""])
    with pytest.raises(UsageError, match=rf"a prompt of {18 - sequence_length} tokens .* which has 16 positions; type"):
        data.check_network("model", 260, 2, 16)
    data.check_network("model", 260, 2, 17)


def test_a_prompt_too_long_by_itself_can_only_be_shortened(build):
    data = build()
    data.encode_prompts(["a" * 99])
    with pytest.raises(UsageError, match=r"16 positions; type a prompt of at most 1 tokens"):
        data.check_network("model", 260, 2, 16)


def test_a_folder_of_a_causal_model_needs_neither_mask_nor_padding(build, tmp_path):
    folder = save_byte_level(tmp_path / "gpt", eos_token="<|endoftext|>")
    data = build(tokenizer=folder, val=[*TEXTS, "<|endoftext|>"], sequence_length=9)
    assert data.special_ids() == {"vocab_size": 257, "mask_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    assert data.bos_id == 256
    assert texts_of(data, "val") == [*TEXTS, "<|endoftext|>"]  # the text of that name is no end
    data.check_network("model", 257, None, 9)
    with pytest.raises(UsageError, match=r"no mask token, which this network needs.*data\.tokenizer=bpe"):
        build_llada(**data.special_ids(), **TINY)
    with pytest.raises(UsageError, match=r"neither a bos_token nor an eos_token"):
        build(tokenizer=save_byte_level(tmp_path / "bare"))


def test_the_config_has_exactly_the_options_of_the_constructor():
    config = OmegaConf.load(ROOT / "conf" / "data" / "packed_text.yaml")
    parameters = inspect.signature(PackedTextDataModule).parameters
    assert set(config) - {"_target_"} == set(parameters)
    assert OmegaConf.is_missing(config, "train")
    for name, parameter in parameters.items():
        if parameter.default is not parameter.empty and name != "seed":
            assert config[name] == parameter.default, name
