"""The objective that turns a causal LM into one that fills masks."""

import pytest
import torch
from helpers.concept import generator
from helpers.foreign import foreign_model, foreign_tokenizer, save_foreign
from helpers.llada import build_small
from torch.testing import assert_close

from models.backbones.bidirectional import fill_nll
from models.backbones.masked_from_causal import load_from_causal
from models.diffusion.from_causal import CausalToMasked, one_block, views_nll
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


def float64(folder, kind, **options):
    """A converted model whose adapters are no no-ops; layer norms of GPT-2 alone are computed in float64."""
    save_foreign(folder, foreign_model(kind), foreign_tokenizer())
    model = load_from_causal(folder, mask_token="<extra_260>", lora_rank=4, **options).double().eval()
    draws = generator(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=draws))
    return model


def padded_batch():
    """Prompts of several lengths, the longest with a column to spare."""
    batch = make_batch(rows=8, prompt=5)
    for row in range(8):
        batch["attention_mask"][row, : 1 + row % 3] = False
    return batch


VIEWS = {
    "some rows have two": torch.tensor([1, 1, 0, 1, 0, 1, 1, 0]),
    "all rows have two": torch.ones(8),
    "none has two": torch.zeros(8),
}


def draw_views(batch, two):
    """(2, 8, L): the rows where `two` is 0 are masked wholly in the first view."""
    half = batch["response_mask"] & (torch.rand(batch["input_ids"].shape, generator=generator(2)) < 0.5)
    half[:, 5], half[:, 6] = True, False
    first = torch.where(two.bool().unsqueeze(-1), half, batch["response_mask"])
    return torch.stack([first, batch["response_mask"] & ~first])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("drawn", VIEWS)
@pytest.mark.parametrize("options", [{}, {"separator": "prompt"}, {"conversion": "bidirectional"}])
def test_a_prompt_that_is_read_once_gives_the_loss_and_the_gradients_of_each_view_alone(tmp_path, options, drawn):
    model, batch = float64(tmp_path, "gpt2", **options), padded_batch()
    x0, seen, response = batch["input_ids"], batch["attention_mask"], batch["response_mask"]
    views = draw_views(batch, VIEWS[drawn])
    found = views_nll(model, x0, views, seen, response)
    alone = [fill_nll(model, torch.where(view, model.mask_id, x0), x0, view, seen, response) for view in views]
    assert_close(found, sum(alone), atol=1e-10, rtol=1e-10)
    weight = torch.rand(x0.shape, generator=generator(3), dtype=torch.float64)
    one, other = (gradients(model, (weight * nll).sum()) for nll in (found, sum(alone)))
    assert one.keys() == other.keys()
    assert "mask_change" in one
    for name in one:
        assert_close(one[name], other[name], atol=1e-10, rtol=1e-10)
    # a view is not the other one: the tokens that the second shows are hidden in the first
    if drawn != "none has two":
        assert not torch.allclose(alone[0] + alone[1].roll(1, 0), found, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("block_length", [None, 2])
def test_two_responses_behind_one_prompt_are_read_as_each_alone(tmp_path, kind, block_length):
    model, batch = float64(tmp_path, kind), padded_batch()
    seen, response = batch["attention_mask"], batch["response_mask"]
    other = torch.where(response, batch["input_ids"].roll(1, 0), batch["input_ids"])
    model.block_length = block_length
    both = model.response_versions(torch.stack([batch["input_ids"], other]), seen, response)
    for states, ids in zip(both, (batch["input_ids"], other), strict=True):
        assert_close(states, model.hidden(model.embed(ids), seen, response_mask=response)[:, 5:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*both, atol=1e-2)


def test_a_step_takes_as_many_forward_passes_whatever_was_drawn(model, monkeypatch):
    """Ranks that gather sharded weights need it, and so does the number of columns that are read."""
    batch, read = make_batch(), []
    run = model._states
    monkeypatch.setattr(model, "_states", lambda x, *rest, **more: (read.append(x.shape[:2]), run(x, *rest, **more))[1])
    for two in VIEWS.values():
        read.clear()
        views_nll(model, batch["input_ids"], draw_views(padded_batch() | batch, two), *list(batch.values())[1:])
        rows = int(two.sum())
        assert read == [(max(1, 8 - rows), 10), (max(1, rows), 3 + 2 * 7)]


@torch.no_grad()
def test_the_bound_takes_as_many_passes_as_are_asked_for(model, monkeypatch):
    batch, calls = make_batch(), []
    run = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args, **more: (calls.append(1), run(*args, **more))[1])
    for passes in (1, 3):
        calls.clear()
        CausalToMasked(likelihood_passes=passes).text_nll(model, batch, generator())
        assert len(calls) == passes
    assert CausalToMasked().likelihood == "bound"
    assert CausalToMasked(likelihood_passes=0).likelihood is None


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


@pytest.mark.slow
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
    for wrong in ({"t_min": 1.5}, {"growth_share": -0.1}, {"growth": ()}, {"growth": (0,)}, {"likelihood_passes": -1}):
        with pytest.raises(UsageError, match=r"module\.objective\."):
            CausalToMasked(**wrong)
