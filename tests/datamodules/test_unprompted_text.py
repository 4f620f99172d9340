"""Packed text as responses without a prompt: nothing of the stream is lost, controls are what they say."""

import json

import pytest
import torch
from helpers.word_pieces import word_pieces
from torch import Generator

from datamodules.tokenizer import build_tokenizer
from datamodules.unprompted_text import UnpromptedTextDataModule, token_counts
from models.functional.errors import UsageError
from models.functional.generated_text import TextNats

TEXTS = [f"Story {k}: the cat saw {k * k} dogs.\n" for k in range(60)]
COLUMNS = {"input_ids", "attention_mask", "response_mask", "target_bytes"}


@pytest.fixture
def build(tmp_path):
    def make(**options):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        defaults = {"name": "text", "train": str(path), "tokenizer": "byte", "vocab_size": 0, "sequence_length": 16}
        sizes = {"batch_size": 4, "eval_batch_size": 5, "cache_dir": tmp_path / "cache"}
        data = UnpromptedTextDataModule(**{**defaults, **sizes, **options})
        data.setup("fit")
        return data

    return make


def test_training_rows_are_responses_and_every_token_of_a_pass_is_in_one(build):
    data = build(shuffle=False, batch_size=1)
    stream, rows = data.rows["train"].stream, list(data.train_dataloader())
    assert set(rows[0]) == COLUMNS
    assert all(row["attention_mask"].all() and row["response_mask"].all() for row in rows)
    read = torch.cat([row["input_ids"] for row in rows]).flatten().tolist()
    whole = torch.cat([torch.tensor(stream.cache.tokens[at : at + n]) for _, at, n in stream.spans(1, len(read))])
    assert read == whole.tolist()
    sizes = torch.cat([row["target_bytes"] for row in rows]).flatten().tolist()
    assert sizes == [int(token != data.bos_id) for token in read]  # one byte a token, none for <bos>


def test_held_out_rows_are_whole_and_spread_over_the_split(build):
    every = build().rows["test"]
    assert every.columns["input_ids"].shape == ((len(build().rows["test"])), 16)
    few = build(max_eval_rows=3)
    chosen = few.rows["test"].columns["input_ids"].tolist()
    assert chosen == [every.columns["input_ids"][k].tolist() for k in (0, round((len(every) - 1) / 2), len(every) - 1)]
    assert [len(batch["input_ids"]) for batch in few.test_dataloader()] == [3]
    seen = [len(batch["input_ids"]) for batch in build().test_dataloader()]
    assert sum(seen) == len(every)
    assert max(seen) == 5


def test_controls(build):
    data = build()
    marginals, real = data.controls()
    rows = data.rows["test"].columns
    assert torch.equal(real(rows, Generator()), rows["input_ids"])
    stream = data.rows["train"].stream
    text = [token for _, at, n in stream.spans(0, len(stream)) for token in stream.cache.tokens[at : at + n].tolist()]
    counts = token_counts(stream, len(data.tokenizer))
    assert counts.tolist() == [text.count(token) for token in range(len(data.tokenizer))]
    many = {name: column[:1].expand(4000, -1) for name, column in rows.items()}
    drawn = marginals(many, Generator().manual_seed(0))
    assert drawn.shape == (4000, 16)
    share = torch.bincount(drawn.flatten(), minlength=len(counts)) / drawn.numel()
    assert (
        share - counts / counts.sum()
    ).abs().max() < 0.006  # five standard deviations of the commonest token's share
    assert torch.equal(drawn, marginals(many, Generator().manual_seed(0)))
    assert not torch.equal(drawn, marginals(many, Generator().manual_seed(1)))


def test_texts_in_and_out(build):
    data = build()
    rows = data.encode_prompts(["", ""])
    assert rows["input_ids"].tolist() == [[data.tokenizer.mask_token_id] * 16] * 2
    assert rows["response_mask"].all()
    assert data.decode_prompts(rows) == ["", ""]
    ids = [*data.tokenizer.encode("end.", add_special_tokens=False), data.bos_id, 50]
    assert data.decode_responses(torch.tensor([ids]))[0].startswith("end.<bos>")
    with pytest.raises(UsageError, match="of this corpus have none; leave prompt= out"):
        data.encode_prompts(["Once"])


def test_the_score_of_the_test_rows_has_variety_and_what_the_judge_says(build):
    class Even:
        """Every token equally likely."""

        tokenizer = build().tokenizer

        def __call__(self, texts):
            counted = torch.tensor([sum(text.counts) for text in texts])
            return TextNats(2.0 * counted, counted)

    data = build(judge=Even())
    rows = data.rows["test"].columns
    score = data.scorer(rows, rows["input_ids"])
    assert score.quality["judge_perplexity"] == pytest.approx(torch.tensor(2.0).exp().item())
    assert 0 < score.quality["text_entropy"] < score.quality["unigram_entropy"]
    assert score.distinct == 1.0


def test_a_judge_of_another_vocabulary_reads_the_rows_documents_as_text(build, tmp_path):
    class Reader:
        tokenizer = build_tokenizer("bpe", TEXTS, 600, tmp_path, packed=True)

        def __call__(self, texts):
            self.texts = texts
            return TextNats(torch.ones(len(texts)), torch.tensor([sum(text.counts) for text in texts]))

    data = build(judge=(reader := Reader()), sequence_length=40)
    rows = data.rows["test"].columns
    data.scorer(rows, rows["input_ids"])
    end = reader.tokenizer.eos_token
    shown = [reader.tokenizer.decode(text.ids) for text in reader.texts]
    assert shown == [text.replace("<bos>", end) for text in data.decode_responses(rows["input_ids"])]
    assert any(end in text.strip(end) for text in shown)


@pytest.fixture
def build_wrapped(build, tmp_path):
    def make(**options):
        return build(tokenizer=str(word_pieces(tmp_path / "pieces")), wrapped=True, **options)

    return make


def test_wrapped_rows_are_the_stream_between_the_ends_of_a_text(build_wrapped):
    data = build_wrapped(shuffle=False, batch_size=1)
    cls, sep = data.tokenizer.cls_token_id, data.tokenizer.sep_token_id
    rows = torch.cat([row["input_ids"] for row in data.train_dataloader()])
    assert rows.shape[1] == data.response_length == 16
    assert (rows[:, 0] == cls).all()
    assert (rows[:, -1] == sep).all()
    # what is between them is the stream, each token once, and documents end with [SEP]
    read = rows[:, 1:-1].flatten().tolist()
    stream = data.rows["train"].stream
    whole = [token for _, at, n in stream.spans(1, len(read)) for token in stream.cache.tokens[at : at + n].tolist()]
    assert read == whole
    assert cls not in read
    texts = "".join(data.tokenizer.decode(read).split()).split("[SEP]")
    known = ["".join(text.split()).lower() for text in TEXTS]
    assert len(texts) > 5
    assert all(text in known for text in texts[:-1])
    # no byte belongs to the ends
    sizes = data.rows["test"].columns["target_bytes"]
    assert sizes[:, [0, -1]].sum() == 0
    assert sizes.sum() > 0


def test_controls_of_wrapped_rows_have_their_ends(build_wrapped):
    data = build_wrapped()
    marginals, real = data.controls()
    rows = data.rows["test"].columns
    drawn, held_out = (control(rows, Generator().manual_seed(0)) for control in (marginals, real))
    assert torch.equal(drawn[:, [0, -1]], held_out[:, [0, -1]])
    assert (drawn[:, 1:-1] != data.tokenizer.cls_token_id).all()


def test_a_judge_reads_no_end_of_a_wrapped_row_as_text(build_wrapped, tmp_path):
    class Reader:
        tokenizer = build_tokenizer("bpe", TEXTS, 600, tmp_path, packed=True)

        def __call__(self, texts):
            self.texts = texts
            return TextNats(torch.ones(len(texts)), torch.tensor([sum(text.counts) for text in texts]))

    data = build_wrapped(judge=(reader := Reader()), sequence_length=40)
    rows = data.rows["test"].columns
    data.scorer(rows, rows["input_ids"])
    end = reader.tokenizer.eos_token_id
    for text in reader.texts:
        assert "[" not in reader.tokenizer.decode(text.ids)
        assert text.ids[0] == text.ids[-1] == end
        # the first end is given, so no end counts, and every other token does
        assert text.counts == [token != end for token in text.ids]


def test_a_run_of_wrapped_rows_has_data_of_its_own(build_wrapped, build, tmp_path):
    pieces = str(word_pieces(tmp_path / "pieces"))
    found = {build_wrapped().fingerprint(), build(tokenizer=pieces).fingerprint()}
    found |= {
        build_wrapped(sequence_length=18).fingerprint(),
        build(tokenizer=pieces, sequence_length=14).fingerprint(),
    }
    assert len(found) == 4
    assert build_wrapped().fingerprint() in found


def test_mistakes_of_wrapped_rows(build_wrapped):
    with pytest.raises(UsageError, match=r"data\.sequence_length=2"):
        build_wrapped(sequence_length=2)
    with pytest.raises(UsageError, match="fewer than one row") as caught:
        build_wrapped(sequence_length=400)
    longest = int(str(caught.value).split("data.sequence_length=")[1].split()[0])
    assert len(build_wrapped(sequence_length=longest).rows["test"]) >= 1


def test_mistakes(build):
    with pytest.raises(UsageError, match=r"data\.document_mask=true has no use here"):
        build(document_mask=True)
    with pytest.raises(UsageError, match=r"data\.max_eval_rows=0"):
        build(max_eval_rows=0)
    with pytest.raises(UsageError, match="fewer than one row"):
        build(sequence_length=200)
