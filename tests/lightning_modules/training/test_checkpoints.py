"""A checkpoint takes the place of the one before it whole, or not at all."""

import os

import pytest
import torch

from lightning_modules.training.checkpoints import ReplacingCheckpointIO


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_checkpoint_whose_writing_fails_leaves_the_one_before(tmp_path, monkeypatch, broken):
    writer, path = ReplacingCheckpointIO(), tmp_path / "new" / "last.ckpt"
    writer.save_checkpoint({"step": 1}, path)

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="no space"):
        writer.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(path.parent.iterdir()) == [path]


def test_what_is_written_lies_in_the_same_folder_until_it_is_whole(tmp_path, monkeypatch):
    """A file is put in place in one step only within a file system."""
    moved = []
    monkeypatch.setattr(os, "replace", lambda old, new: moved.append((old.parent, torch.load(old), new)))
    ReplacingCheckpointIO().save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert moved == [(tmp_path, {"step": 2}, tmp_path / "last.ckpt")]
