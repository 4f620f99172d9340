"""Numbers of blocks, who sees whom by enumeration, and hidden tokens of each block."""

import itertools

import pytest
import torch

from models.functional.block_diffusion import (
    before_last_block,
    block_attention,
    block_numbers,
    block_sizes,
    hide_in_blocks,
    of_own_block,
)

RESPONSE = torch.tensor([[False, False, *[True] * 5]])


@pytest.mark.parametrize(
    ("block_length", "numbers"),
    [
        (1, [0, 0, 1, 2, 3, 4, 5]),
        (2, [0, 0, 1, 1, 2, 2, 3]),
        (4, [0, 0, 1, 1, 1, 1, 2]),
        (None, [0, 0, 1, 1, 1, 1, 1]),
    ],
)
def test_blocks_are_numbered_from_the_first_response_token(block_length, numbers):
    block = block_numbers(RESPONSE, block_length)
    assert block.tolist() == [numbers]
    assert block_sizes(block).tolist() == [[numbers.count(k) for k in range(1, max(numbers) + 1)]]
    assert before_last_block(block) == numbers.index(max(numbers))
    values = torch.arange(1.0, max(numbers) + 1).unsqueeze(0) * 10
    assert of_own_block(values, block).tolist() == [[10.0 * max(1, k) for k in numbers]]


def test_a_row_without_prompt_and_of_one_block_has_nothing_before_its_last():
    assert before_last_block(block_numbers(torch.ones(2, 3, dtype=torch.bool), None)) == 0


def sees(query: tuple[int, bool], key: tuple[int, bool]) -> bool:
    """Columns as (block, noised), by the definition of the paper."""
    block_diagonal = query[0] == key[0] and query[1] == key[1]
    offset_block_causal = query[1] and not key[1] and query[0] > key[0]
    block_causal = not query[1] and not key[1] and query[0] >= key[0]
    return block_diagonal or offset_block_causal or block_causal


def test_who_sees_whom_among_two_copies():
    columns = [(0, False), (0, False), (1, False), (1, False), (2, False), (1, True), (1, True), (2, True), (2, True)]
    block, noised = (torch.tensor([part]) for part in zip(*columns, strict=True))
    found = block_attention(block, noised, torch.ones_like(noised))
    assert found.shape == (1, 1, 9, 9)
    for (q, query), (k, key) in itertools.product(enumerate(columns), repeat=2):
        assert bool(found[0, 0, q, k]) == sees(query, key), (query, key)
    # control: a noised block that saw its own clean copy would read the answer
    assert not found[0, 0, 5, 2]
    assert not torch.equal(found, block_attention(block, torch.zeros_like(noised), torch.ones_like(noised)))


def test_padding_is_seen_by_itself_alone():
    block, noised = torch.tensor([[0, 0, 1, 1]]), torch.zeros(1, 4, dtype=torch.bool)
    found = block_attention(block, noised, torch.tensor([[False, True, True, True]]))[0, 0]
    assert found[:, 0].tolist() == [True, False, False, False]
    assert found[0].tolist() == [True, True, False, False]


def test_each_block_hides_as_many_tokens_as_asked_and_all_choices_are_alike():
    """Two blocks of 4 and 3 tokens: 2 of 4 and 1 of 3 hidden, 18 choices equally likely."""
    block = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2]]).expand(18_000, -1)
    count = torch.tensor([[2, 1]]).expand(18_000, -1)
    hidden = hide_in_blocks(block, count, torch.Generator().manual_seed(0))
    assert not hidden[:, 0].any()
    assert (hidden[:, 1:5].sum(-1) == 2).all()
    assert (hidden[:, 5:].sum(-1) == 1).all()
    choices, times = torch.unique(hidden, dim=0, return_counts=True)
    assert len(choices) == 18
    chi_square = ((times - 1000.0) ** 2 / 1000.0).sum()
    assert chi_square < 40.8  # 0.1 % point with 17 degrees of freedom
    # control: with blocks taken together as one, the choices are others
    together = hide_in_blocks((block > 0).long(), torch.full((18_000, 1), 3), torch.Generator().manual_seed(0))
    assert len(torch.unique(together, dim=0)) == 35
