"""Batches carry the signals of their texts."""

import torch

from models.functional.rows import signals_of


def carried(data) -> None:
    """Every batch of every split has the signals that the corpus gives for its rows."""
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            wanted, found = data.signals(batch), signals_of(batch)
            assert set(found) == set(wanted) == set(data.signal_sizes)
            for name, values in wanted.items():
                assert torch.equal(found[name], values), name


def test_of_the_oracle(tiny_oracle):
    carried(tiny_oracle)


def test_of_pairs(build_pairs):
    rows = [{"q": {"name": n, "food": f}, "a": f"{n} {f}"} for n in ("Aromi", "Blue") for f in ("Thai", "Pub")]
    data = build_pairs(train=rows, val=rows[:2], test=rows[2:], batch_size=2)
    carried(data)
