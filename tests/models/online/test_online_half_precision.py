"""A backbone in bfloat16: what is added to it stays float32, and reads and writes the backbone's hidden states."""

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.online import HALF, texts

from models.backbones.added_layers import AddedLinear
from models.online.decoder import IncrementalForward
from models.online.growth import GROWTH
from models.online.model import OnlineConceptModel

CASES = [
    *((growth, "gumbel_st", 1) for growth in GROWTH),
    ("null", "fsq", 1),
    ("null", "ema_vq", 1),
    ("fixed", "gumbel_st", 2),
]


def in_bfloat16(growth: str, sampler: str = "gumbel_st", levels: int = 1) -> OnlineConceptModel:
    torch.manual_seed(0)
    backbone = tiny_causal(13, num_hidden_layers=6).bfloat16()
    split = [1, 4, 1] if levels == 1 else [1, [1, 2, 1], 1]
    return OnlineConceptModel(backbone, split=split, growth=growth, sampler=sampler, codes=8, most_nulls=3).eval()


@pytest.mark.parametrize(("growth", "sampler", "levels"), CASES)
def test_new_weights_are_float32_and_states_bfloat16(growth, sampler, levels):
    model, ids = in_bfloat16(growth, sampler, levels), texts()
    assert {p.dtype for p in model.stack.parameters()} == {torch.float32}
    states, found = model.read(ids, settings=HALF)
    assert states.dtype == torch.bfloat16
    assert found[0].routing.commit.any()
    model.logits(states).float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.stack.parameters())


@pytest.mark.parametrize(("growth", "sampler", "levels"), CASES)
def test_steps_with_caches_are_one_forward(growth, sampler, levels):
    model, ids = in_bfloat16(growth, sampler, levels), texts()
    whole = model.logits(model.read(ids, settings=HALF)[0])
    model.set_inference_settings(HALF.compression, HALF.quantisation)
    run = IncrementalForward(model)
    logits = [run.prefill(ids[:, :4]), *(run.step(ids[:, t]) for t in range(4, ids.shape[1]))]
    agree = [
        torch.allclose(new.float(), old.float(), atol=0.1)
        for new, old in zip(logits, whole[:, 3:].unbind(1), strict=True)
    ]
    assert sum(agree) >= len(agree) - 1  # rounding may decide a tie of one commit


def test_small_steps_are_not_rounded_away():
    """At a rate of 1e-4 a weight of 1 moves in float32 and stands still in bfloat16."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = AddedLinear(4, 4, bias=False, dtype=dtype)
        torch.nn.init.ones_(layer.weight)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            out = layer(torch.ones(2, 4, dtype=torch.bfloat16))
            assert out.dtype == torch.bfloat16
            out.float().sum().backward()
            optimizer.step()
        moved[dtype] = (layer.weight.float() - 1).abs().max().item()
    assert moved[torch.float32] == pytest.approx(3e-4, rel=1e-2)
    assert moved[torch.bfloat16] == 0.0
