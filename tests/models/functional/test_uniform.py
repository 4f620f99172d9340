"""Draws for choices are float32 whatever the default type is."""

import torch

from models.functional.masked_diffusion import antithetic_times, mask_tokens
from models.functional.masked_lm import hide_exactly
from models.functional.uniform import uniform


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_draws_are_alike_under_every_default_type():
    full = uniform(2, 50, generator=generator())
    assert full.shape == (2, 50)
    assert 0 <= full.min() < 0.1
    assert 0.9 < full.max() < 1
    maskable = torch.ones(4, 64, dtype=torch.bool)

    def drawn() -> list[torch.Tensor]:
        return [
            uniform(2, 50, generator=generator()),
            antithetic_times(5, generator(), torch.device("cpu")),
            mask_tokens(maskable.long(), maskable, torch.full((4,), 0.3), 0, generator())[1],
            hide_exactly(maskable, torch.full((4,), 20), generator()),
        ]

    expected = drawn()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    for here, there in zip(found, expected, strict=True):
        assert here.dtype == there.dtype
        assert torch.equal(here, there)
    assert torch.equal(found[0], full)
