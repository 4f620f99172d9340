"""Rows put together again are the stream, whatever ranks, workers, epochs and resumed runs read them."""

import json
import pickle

import numpy as np
import pytest
import torch
from helpers.trainer import quiet_trainer
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.loader import ResumableLoader
from datamodules.packing import EndlessOrder, OnePass, PackedRows, TokenStream
from datamodules.token_cache import TokenCache

DOCUMENTS = [7, 1, 30, 12, 3, 45, 2, 20]  # tokens of each, <bos> included


@pytest.fixture
def cache(tmp_path):
    """A cache of 120 different tokens: token n is the number n, and it stands for n % 5 bytes."""
    tokens = np.arange(sum(DOCUMENTS), dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    (tokens % 5).tofile(tmp_path / "target_bytes.bin")
    starts = np.cumsum([0, *DOCUMENTS[:-1]])
    starts.tofile(tmp_path / "starts.bin")
    np.arange(len(starts), dtype=np.uint64).tofile(tmp_path / "hashes.bin")
    (tmp_path / "about.json").write_text(json.dumps({"id_type": "uint16", "bytes_type": "uint16"}))
    return TokenCache(tmp_path)


@pytest.fixture
def as_ranks(monkeypatch):
    """A function that makes this process a rank of several."""

    def become(rank: int, world: int) -> None:
        for module in ("loader", "packing"):
            monkeypatch.setattr(f"datamodules.{module}.rank_and_world", lambda: (rank, world))

    return become


def endless(stream, length, batch_size, shuffle=True, seed=0, workers=0, document_mask=False):
    rows = PackedRows(stream, length, document_mask=document_mask, endless=True)
    order = EndlessOrder(len(stream), length, batch_size, shuffle=shuffle, seed=seed)
    return ResumableLoader(rows, order=order, num_workers=workers)


def read(loader, epochs, skip=0):
    """Rows [input..., last target] of some epochs, batch by batch, the first few batches of the first left out."""
    batches = []
    for epoch in epochs:
        loader.set_epoch(epoch)
        batches += [torch.cat([batch["input_ids"], batch["labels"][:, -1:]], 1).tolist() for batch in loader]
    return batches[skip:]


def repeated(cache, length):
    """The stream over and over, as whole rows."""
    stream = np.tile(cache.tokens, 40).tolist()
    return [stream[start : start + length + 1] for start in range(0, len(stream) - length, length)]


# -- nothing lost, nothing twice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_rows_put_together_are_the_stream_over_epochs(cache, as_ranks, world, workers):
    # 120 tokens, rows of 7: 17 rows and a token left; batches of 4: 4 steps and a row left, both open the next epoch
    batches = []
    for rank in range(world):
        as_ranks(rank, world)
        batches.append(read(endless(TokenStream(cache), 7, 4 // world, shuffle=False, workers=workers), range(5)))
    assert {len(batch) for part in batches for batch in part} == {4 // world}
    rows = sum((row for parts in zip(*batches, strict=True) for row in zip(*parts, strict=True)), start=())
    assert len(rows) == 5 * 4 * 4
    assert list(rows) == repeated(cache, 7)[: len(rows)]
    inputs = [token for row in rows for token in row[:-1]]
    assert [*inputs, rows[-1][-1]] == np.tile(cache.tokens, 5)[: len(rows) * 7 + 1].tolist()


@pytest.mark.parametrize(("length", "batch_size"), [(7, 4), (119, 1), (16, 3), (50, 5), (1, 120)])
def test_shuffled_rows_are_all_rows_once(cache, length, batch_size):
    loader = endless(TokenStream(cache), length, batch_size)
    epochs = 12
    rows = [tuple(row) for batch in read(loader, range(epochs)) for row in batch]
    assert len(rows) == epochs * len(loader) * batch_size
    # all rows that begin in a pass are read before the first of the next
    passes = len(rows) * length // 120
    whole = -(-passes * 120 // length)
    assert sorted(rows[:whole]) == sorted(map(tuple, repeated(cache, length)[:whole]))
    assert len(loader) == max(1, 120 // length // batch_size)


def test_rows_come_in_another_order_each_pass_and_seed():
    def order(seed, number):
        rows = EndlessOrder(120, 5, 8, shuffle=True, seed=seed)._rows(24 * number)
        return tuple(next(rows) % 24 for _ in range(24))

    assert order(0, 0) == order(0, 0)
    found = {order(0, 0), order(0, 1), order(1, 0), tuple(range(24))}
    assert len(found) == 4
    assert {tuple(sorted(one)) for one in found} == {tuple(range(24))}


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_share_the_batches_of_one(cache, as_ranks, world):
    stream = TokenStream(cache)
    as_ranks(0, 1)
    whole = read(endless(stream, 7, 4), range(3))
    parts = []
    for rank in range(world):
        as_ranks(rank, world)
        parts.append(read(endless(stream, 7, 4 // world), range(3)))
    together = [[row for rows in zip(*batch, strict=True) for row in rows] for batch in zip(*parts, strict=True)]
    assert together == whole


@pytest.mark.parametrize("length", [7, 17, 119, 500])
@pytest.mark.parametrize("world", [1, 2])
def test_one_pass_scores_every_token_once(cache, as_ranks, length, world):
    stream, targets, sizes = TokenStream(cache), [], []
    for rank in range(world):
        as_ranks(rank, world)
        rows = PackedRows(stream, length, document_mask=False, endless=False)
        order = OnePass(len(stream), length, 3)
        loader = ResumableLoader(rows, order=order)
        batches = list(loader)
        assert len(batches) <= len(loader)
        assert world > 1 or len(batches) == len(loader)
        for batch in batches:
            assert torch.equal(batch["input_ids"] + 1, batch["labels"])
            targets += batch["labels"].flatten().tolist()
            sizes += batch["target_bytes"].flatten().tolist()
    assert sorted(targets) == list(range(1, 120))
    assert sum(sizes) == sum(n % 5 for n in range(1, 120))


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("taken", [1, 3])
def test_a_resumed_loader_continues_at_the_exact_row(cache, workers, taken):
    whole, cut, resumed = (endless(TokenStream(cache), 7, 4, workers=workers) for _ in range(3))
    cut.set_epoch(1)
    batches = iter(cut)
    for _ in range(taken):
        next(batches)
    resumed.load_state_dict(cut.state_dict())
    assert read(resumed, [1, 2]) == read(whole, [1, 2], skip=taken)


def test_another_number_of_rows_a_step_is_warned_of(cache, as_ranks):
    saved = endless(TokenStream(cache), 7, 4).state_dict()
    as_ranks(1, 2)
    endless(TokenStream(cache), 7, 2).load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"took 4 rows a step and now takes 8.*type data\.batch_size=2 for that"):
        endless(TokenStream(cache), 7, 4).load_state_dict(saved)


class Reader(LightningModule):
    """Notes down what it is given."""

    def __init__(self, seen):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), seen

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_training_reads_what_the_uninterrupted_one_reads(cache, tmp_path):
    whole = []
    saved = ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(11, callbacks=[saved], enable_checkpointing=True)
    trainer.fit(Reader(whole), endless(TokenStream(cache), 7, 4))
    for stop in (3, 4, 6):  # an epoch has 4 steps
        rest, loader = [], endless(TokenStream(cache), 7, 4)
        quiet_trainer(11).fit(
            Reader(rest), loader, ckpt_path=tmp_path / "saved" / f"step={stop}.ckpt", weights_only=True
        )
        assert rest == whole[stop:]
    assert whole == [[row[:-1] for row in batch] for batch in read(loader, range(3))][:11]


# -- parts of a cache, documents in a row ----------------------------------------------------------------------------


def test_a_stream_of_some_documents_is_theirs_in_order(cache):
    chosen = np.array([True, False, True, True, False, False, True, True])
    stream = TokenStream(cache, chosen)
    parts = np.split(cache.tokens, np.cumsum(DOCUMENTS)[:-1])
    expected = np.concatenate([part for part, take in zip(parts, chosen, strict=True) if take])
    assert (len(stream), stream.documents, len(stream.starts)) == (71, 5, 3)
    rows = PackedRows(stream, 70, document_mask=False, endless=False)[0]
    assert torch.cat([rows["input_ids"], rows["labels"][-1:]]).tolist() == expected.tolist()
    assert rows["target_bytes"].tolist() == (expected[1:] % 5).tolist()


def test_documents_are_numbered_and_counted_in_each_row(cache):
    batch = next(iter(endless(TokenStream(cache), 10, 2, shuffle=False, document_mask=True)))
    # documents of 7, 1 and 30 tokens; the third goes on in the second row
    assert batch["document_ids"].tolist() == [[0] * 7 + [1] + [2] * 2, [0] * 10]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 0, 1], list(range(10))]


@pytest.mark.parametrize("length", [4, 16, 60, 119])
def test_documents_in_rows_are_those_of_the_corpus(cache, length):
    chosen = np.array([True, False, True, True, False, True, True, True])
    begins = set(np.cumsum([0, *DOCUMENTS])[:-1].tolist())
    for batch in endless(TokenStream(cache, chosen), length, 2, document_mask=True):
        columns = (batch[name].tolist() for name in ("input_ids", "document_ids", "position_ids"))
        for tokens, documents, positions in zip(*columns, strict=True):
            document, position = 0, -1
            for k, token in enumerate(tokens):
                new = k > 0 and token in begins
                document, position = document + new, 0 if new else position + 1
                assert (documents[k], positions[k]) == (document, position)


def test_rows_travel_to_workers_by_path(cache):
    rows = PackedRows(TokenStream(cache), 8, document_mask=False, endless=True)
    assert len(pickle.dumps(rows)) < 2000
    assert torch.equal(pickle.loads(pickle.dumps(rows))[3]["labels"], rows[3]["labels"])
