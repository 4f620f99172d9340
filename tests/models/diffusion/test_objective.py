"""Which tokens a masked diffusion's form may mask."""

import pytest
import torch

from models.diffusion.objective import MaskedDiffusion


@pytest.mark.parametrize("form", ["sft", "pretrain"])
def test_prompts_are_masked_in_pretraining_alone_and_padding_never(tiny_llada, form, monkeypatch):
    model, read = tiny_llada(), []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda ids: read.append(ids) or embed(ids))
    real, response = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    real[0, 0], response[:, 3:] = False, True
    rows = {"input_ids": torch.full((2, 5), 7), "attention_mask": real, "response_mask": response}
    objective = MaskedDiffusion(form, random_length_probability=0.0)
    with torch.no_grad():
        for seed in range(30):
            objective(model, rows, torch.Generator().manual_seed(seed))
    ever = (torch.stack(read) == model.mask_id).any(0)
    assert torch.equal(ever, response if form == "sft" else real)
