"""Heads that look at a neighbour: where their scores are highest, by transformers' own rotary positions."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.functional.neighbour_heads import SHARPNESS, neighbour_biases, offset_of_head

PLACES = 60


def scores(query: torch.Tensor, key: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """(L, L) scores of every place for every other one, both with the same content everywhere."""
    angles = torch.outer(torch.arange(PLACES, dtype=torch.float64), torch.cat([frequencies, frequencies]))
    q, k = (bias.expand(1, 1, PLACES, -1) for bias in (query, key))
    q, k = apply_rotary_pos_emb(q, k, angles.cos().unsqueeze(0), angles.sin().unsqueeze(0))
    return (q @ k.mT)[0, 0] / len(query) ** 0.5


@pytest.mark.parametrize("theta", [100.0, 10_000.0])
@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("offset", [-2, -1, 0, 1, 2])
def test_a_head_looks_so_many_places_on(theta, width, offset):
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    found = scores(*neighbour_biases(frequencies, offset), frequencies)
    inside = torch.arange(2, PLACES - 2)
    assert torch.equal(found[inside].argmax(-1), inside + offset)
    # the equation, worked out place by place
    i, j = 30, torch.arange(PLACES)
    expected = SHARPNESS * sum((omega * (j - i - offset)).cos() for omega in frequencies[:3])
    torch.testing.assert_close(found[i], expected)


def test_offsets():
    assert [offset_of_head(head) for head in range(4)] == [-1, 1, -2, 2]
