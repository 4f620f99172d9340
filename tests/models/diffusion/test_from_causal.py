"""The objective that turns a causal LM into one that fills masks."""

import pytest
import torch
from helpers.concept import generator
from helpers.foreign import foreign_model, foreign_tokenizer, save_foreign
from helpers.llada import build_small
from torch.testing import assert_close

from models.backbones.bidirectional import fill_nll
from models.backbones.masked_from_causal import load_from_causal
from models.diffusion.from_causal import CausalToMasked, one_block
from models.diffusion.sampler import generate_masked_diffusion
from models.functional.errors import UsageError


@pytest.fixture
def model(tmp_path):
    save_foreign(tmp_path, foreign_model("llama"), foreign_tokenizer())
    return load_from_causal(tmp_path, mask_token="<extra_260>", lora_rank=4)


def make_batch(rows=8, prompt=4, response=6):
    ids = torch.randint(2, 250, (rows, prompt + response), generator=generator(1))
    mask = torch.arange(prompt + response).expand(rows, -1) >= prompt
    return {"input_ids": ids, "attention_mask": torch.ones_like(mask), "response_mask": mask}


def test_two_views_cover_every_response_token_once(model):
    batch, objective = make_batch(), CausalToMasked()
    terms = objective(model, batch, generator())
    assert terms.tokens == int(batch["response_mask"].sum())
    assert torch.equal(terms.position_nll > 0, batch["response_mask"])
    assert_close(terms.loss, terms.position_nll.sum() / terms.tokens)
    one = CausalToMasked(complementary=False, all_masked_share=0.0)(model, batch, generator())
    assert one.tokens < terms.tokens


@torch.no_grad()
def test_the_loss_is_that_of_the_masks_that_were_drawn(model, monkeypatch):
    """Each view alone, by hand: the first token is masked in one view, all others in the other."""
    batch = make_batch()
    first = torch.zeros_like(batch["response_mask"])
    first[:, 4] = True
    objective = CausalToMasked()
    monkeypatch.setattr(objective, "_mask", lambda maskable, generator: maskable & first)
    found = objective(model.eval(), batch, generator()).position_nll
    for masked in (first, batch["response_mask"] & ~first):
        xt = torch.where(masked, model.mask_id, batch["input_ids"])
        nll = fill_nll(model, xt, batch["input_ids"], masked, batch["attention_mask"], batch["response_mask"])
        assert_close(found[masked], nll[masked], atol=1e-4, rtol=1e-4)
    clean = fill_nll(
        model, batch["input_ids"], batch["input_ids"], first, batch["attention_mask"], batch["response_mask"]
    )
    assert not torch.allclose(found[first], clean[first], atol=1e-2)


def test_a_share_of_the_rows_is_masked_wholly():
    response = torch.ones(4000, 8, dtype=torch.bool)
    for share in (0.0, 0.25):
        masked = CausalToMasked(t_min=0.1, all_masked_share=share)._mask(response, generator())
        # P(all 8 masked) = share + (1 - share) E[t^8], t ~ U(.1, 1)
        expected = share + (1 - share) * (1 - 0.1**9) / 9 / 0.9
        assert masked.all(-1).double().mean().item() == pytest.approx(expected, abs=0.025)
        assert masked.double().mean().item() == pytest.approx(share + (1 - share) * 0.55, abs=0.02)


def test_blocks_grow_in_equal_parts_of_the_first_steps():
    objective = CausalToMasked(growth=(1, 4, 16), growth_share=0.3)
    lengths = []
    for share in (0.0, 0.09, 0.11, 0.19, 0.21, 0.29, 0.31, 1.0):
        objective.before_step(share)
        lengths.append(objective.block_length())
    assert lengths == [1, 1, 4, 4, 16, 16, None, None]
    assert CausalToMasked().block_length() is None


def test_a_block_is_one_of_the_response_each_equally_often():
    response = torch.tensor([[False, False, *[True] * 7]]).expand(3000, -1)
    chosen = one_block(response, 3, generator())
    starts = {tuple(row.nonzero()[:, 0].tolist()) for row in chosen}
    assert starts == {(2, 3, 4), (5, 6, 7), (8,)}
    assert chosen[:, 8].double().mean().item() == pytest.approx(1 / 3, abs=0.03)


@torch.no_grad()
def test_with_blocks_of_one_the_loss_is_the_causal_model_s(model):
    """A masked token whose block is itself is predicted from the clean text before it."""
    batch, objective = make_batch(), CausalToMasked(growth=(1,), growth_share=1.0, all_masked_share=1.0)
    terms = objective(model.eval(), batch, generator())
    model.block_length = 1
    causal = fill_nll(
        model,
        batch["input_ids"],
        batch["input_ids"],
        batch["response_mask"],
        batch["attention_mask"],
        batch["response_mask"],
    )
    model.block_length = None
    scored = terms.position_nll > 0
    assert (scored.sum(-1) == 1).all()
    assert_close(terms.position_nll[scored], causal[scored], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(
        CausalToMasked(all_masked_share=1.0)(model, batch, generator()).position_nll, causal, atol=0.1
    )


@torch.no_grad()
def test_the_next_token_loss_is_that_of_blocks_of_one(model):
    batch = make_batch()
    ids, seen, response = batch["input_ids"], batch["attention_mask"], batch["response_mask"]
    found = CausalToMasked().causal_nll(model.eval(), batch)
    model.block_length = 1
    assert_close(found, fill_nll(model, ids, ids, response, seen, response).sum() / response.sum())


@torch.no_grad()
def test_the_next_token_loss_falls_from_its_first_to_its_last_weight(model):
    batch, objective = make_batch(), CausalToMasked(next_token=(0.5, 0.1))
    plain = CausalToMasked()(model.eval(), batch, generator()).loss
    own = objective.causal_nll(model, batch)
    for share, weight in ((0.0, 0.5), (0.5, 0.3), (1.0, 0.1)):
        objective.before_step(share)
        terms = objective(model, batch, generator())
        assert_close(terms.loss, plain + weight * own)
        assert_close(terms.raw["next_token"], own)
    assert model.block_length is None


def test_eight_rows_are_learned_by_heart(model):
    batch, objective = make_batch(), CausalToMasked()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    draws = generator()
    for _ in range(250):
        loss = objective(model, batch, draws).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    own = batch["input_ids"][:, 4:]
    options = {"temperature": 0.0, "remasking": "random"}
    written = generate_masked_diffusion(model, batch, generator(), steps=6, **options)
    assert (written == own).double().mean() > 0.95
    # what it had to learn: the causal model that it began as does not know these rows
    with torch.no_grad():
        model.mask_change.zero_()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    begun = generate_masked_diffusion(model, batch, generator(), steps=6, **options)
    assert (begun == own).double().mean() < 0.2


def test_only_a_converted_model_is_accepted():
    with pytest.raises(UsageError, match=r"model=from_causal"):
        CausalToMasked().attach(build_small())
    for wrong in ({"t_min": 1.5}, {"growth_share": -0.1}, {"growth": ()}, {"growth": (0,)}):
        with pytest.raises(UsageError, match=r"module\.objective\."):
            CausalToMasked(**wrong)
