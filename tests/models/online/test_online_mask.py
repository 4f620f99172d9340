"""The blocks that FlexAttention reads are the dense mask's."""

import pytest
import torch
from helpers.online import padded, texts, tiny_online
from torch.nn.attention.flex_attention import create_mask

from models.functional.commits import deep_mask, pack_commits
from models.online.attention import concepts_first, deep_block_mask
from models.online.concept_stack import CompressionSettings

HALF = CompressionSettings(compression=2.0, quantisation=0.5)


@pytest.mark.parametrize("split", [[1, 2, 1], [1, [1, 1, 1], 1]])
def test_blocks_of_the_mask_are_the_mask(split):
    """FlexAttention over [concepts | tokens], with grouped heads, padding and more than one block of 128."""
    rows = [texts(rows=1, length=length, seed=length)[0] for length in (150, 131)]
    ids, valid = padded(rows, left=True)
    found = {}
    for attention in ("sdpa", "flex"):
        model = tiny_online(split, growth="null", attention=attention).float()
        with torch.no_grad():
            found[attention] = model.logits(model.read(ids, valid, settings=HALF)[0])[valid]
    torch.testing.assert_close(found["flex"], found["sdpa"], atol=2e-5, rtol=1e-4)
    for stack in model.stacks():
        stack.attention = "sdpa"  # the same function answers for both
    with torch.no_grad():
        assert torch.equal(model.logits(model.read(ids, valid, settings=HALF)[0])[valid], found["sdpa"])


def test_blocks_keep_documents_apart():
    ids = texts(rows=2, length=150)
    documents = torch.arange(150).expand(2, -1) // 60
    positions, found = torch.arange(150).expand(2, -1) % 60, []
    for attention in ("sdpa", "flex"):
        model = tiny_online(growth="null", attention=attention).float()
        with torch.no_grad():
            found.append(model.read(ids, positions=positions, settings=HALF, documents=documents)[0])
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


def test_concepts_together_leave_blocks_empty():
    commit = torch.arange(1024).remainder(4).eq(3)[None]
    packing, valid = pack_commits(commit), torch.ones_like(commit)
    order = concepts_first(commit)
    assert order[0, :3].tolist() == [3, 7, 11]
    mixed = deep_block_mask(commit, packing, valid, torch.arange(1024)[None])
    apart = deep_block_mask(commit, packing, valid, order)
    assert apart.sparsity() > mixed.sparsity() + 5  # per cent of the blocks are skipped
    dense = deep_mask(commit, packing.segment, valid)[0, 0]
    assert apart.to_dense()[0, 0].sum() < mixed.to_dense()[0, 0].sum()
    assert dense.sum() == create_mask(apart.mask_mod, 1, 1, 1024, 1024, device="cpu").sum()
