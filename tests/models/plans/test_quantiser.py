"""Codes of a small space inside a planner: what is read is what was chosen, gradients reach the state, codes follow points."""

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.concept import BASE, generator, some_texts
from torch.testing import assert_close

from models.plans.executor import AutoregressiveExecutor
from models.plans.planner import Coder, Planner
from models.plans.unified import UnifiedModel
from models.plans.vocabulary import IMPOSSIBLE, ConceptVocabulary

TYPES = {"a": {"codes": 4, "most": 2}, "b": {"codes": 6}}


def case(sampler: str, planning: str = "slots"):
    torch.manual_seed(0)
    model = UnifiedModel(tiny_causal(BASE), ConceptVocabulary(TYPES, BASE), sampler).double().eval()
    for space in model.quantiser.spaces:
        torch.nn.init.normal_(space.to_point.weight, std=0.5)
        torch.nn.init.normal_(space.to_embedding.weight, std=0.5)
        if space.moving:
            torch.nn.init.normal_(space.codes)
    return model, Planner(model, planning, model.quantiser)


@pytest.mark.parametrize("sampler", ["fsq", "ema_vq"])
@pytest.mark.parametrize("planning", ["slots", "types", "sequential"])
def test_what_is_read_is_what_was_chosen(sampler, planning):
    model, planner = case(sampler, planning)
    text, mask = some_texts(12)
    plan = planner.draw(text, mask, Coder(model.quantiser))
    ids, embeds = planner.block(plan.choices)
    assert torch.equal(ids, plan.ids)
    assert_close(embeds, plan.embeds)
    assert_close(planner.score(text, mask, plan.choices), plan.logits)
    assert torch.equal(plan.logits.argmax(-1), plan.choices)
    assert plan.choices.min() >= 1  # no end
    assert plan.choices[:, :2].max() <= 4
    assert (plan.logits[:, :2, 5:] == IMPOSSIBLE).all()
    assert len(torch.unique(plan.choices, dim=0)) > 2


@pytest.mark.parametrize("sampler", ["fsq", "ema_vq"])
def test_the_gradient_is_that_of_the_point_at_every_share(sampler):
    """By hand: d loss / d state = d loss / d embedding · to_embedding · to_point, as if nothing had been rounded."""
    model, _ = case(sampler)
    space = model.quantiser.spaces[0]
    state = torch.randn(5, 16, dtype=torch.float64, generator=generator()).requires_grad_()
    pull = torch.randn(5, 16, dtype=torch.float64, generator=generator(1))
    (by_hand,) = torch.autograd.grad((space.to_embedding(space.point(state)) * pull).sum(), state)
    for share in (0.0, 0.3, 1.0):
        coded = space(state, share)
        (found,) = torch.autograd.grad((coded.embeds * pull).sum(), state)
        assert_close(found, by_hand)
        away = (coded.embeds - coded.soft_embeds).norm() / (coded.hard_embeds - coded.soft_embeds).norm()
        assert float(away) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("sampler", ["fsq", "ema_vq"])
def test_a_text_s_price_reaches_the_posterior_and_not_the_codes(sampler):
    model, planner = case(sampler)
    text, mask = some_texts(6)
    plan = planner.draw(text, mask, Coder(model.quantiser, 0.5))
    nll = (
        -AutoregressiveExecutor(model)
        .logits(plan.ids, plan.embeds, text)
        .log_softmax(-1)
        .gather(-1, text.unsqueeze(-1))
        .mean()
    )
    nll.backward()
    for space in model.quantiser.spaces:
        assert space.to_point.weight.grad.abs().max() > 1e-6
        assert space.to_embedding.weight.grad.abs().max() > 1e-6
        assert not space.codes.requires_grad
    assert model.new_head.weight.grad is None


def test_codes_follow_their_points_and_the_dead_start_anew():
    model, planner = case("ema_vq")
    text, mask = some_texts(40)
    coder = Coder(model.quantiser)
    planner.draw(text, mask, coder)
    assert sorted(coder.points) == [0, 1, 2]
    own = torch.cat([coder.points[0], coder.points[1]])

    def distance() -> float:
        codes = model.quantiser.spaces[0].codes
        return float((own.unsqueeze(1) - codes).square().sum(-1).amin(-1).mean())

    before = distance()
    model.quantiser.follow(coder.points, 0.99, generator(), begin=True)
    begun = distance()
    assert begun < 0.5 * before
    model.quantiser.spaces[0].codes[1] = 1e3  # nobody is near it any more
    model.quantiser.spaces[0].counts[1] = 0.0
    assert model.quantiser.follow(coder.points, 0.99, generator()) == 1
    assert model.quantiser.spaces[0].codes.abs().max() < 100
    fixed, _ = case("fsq")
    assert not fixed.quantiser.moving


def test_the_order_of_points_is_all_that_a_start_depends_on():
    """The same points in the same order give the same codes: ranks that gather them agree."""
    found = []
    for _ in range(2):
        model, planner = case("ema_vq")
        coder = Coder(model.quantiser)
        planner.draw(*some_texts(40), coder)
        model.quantiser.follow(coder.points, 0.99, generator(3), begin=True)
        model.quantiser.follow(coder.points, 0.9, generator(4))
        found.append([space.codes for space in model.quantiser.spaces])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_codes_that_follow_points_have_no_gradient():
    (space, *_) = case("ema_vq")[0].quantiser.spaces
    points = torch.randn(8, space.codes.shape[1], generator=generator(), dtype=space.codes.dtype, requires_grad=True)
    space.follow(points, 0.9, generator())
    assert not any(values.requires_grad for values in space.books[0])
