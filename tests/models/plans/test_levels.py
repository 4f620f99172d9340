"""Concepts of several levels: a coarse code, and finer ones of what the coarser leave of a point."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from helpers.causal import tiny_causal
from helpers.concept import BASE, every_plan, generator, log_prob, some_texts
from torch.testing import assert_close

from models.backbones.code_space import CodeSpace
from models.functional.bits_per_byte import token_nll
from models.functional.errors import UsageError
from models.functional.plan_nll import plan_nll
from models.functional.usage import usage_kl
from models.functional.vector_quantisation import residuals
from models.plans.executor import AutoregressiveExecutor
from models.plans.options import FixedPlanOptions
from models.plans.planner import Coder, Planner
from models.plans.posterior_gradient import PosteriorGradient
from models.plans.probe import PlanProbe
from models.plans.search import beam
from models.plans.terms import plan_terms
from models.plans.unified import UnifiedModel
from models.plans.vocabulary import ConceptVocabulary

TYPES = {"a": {"codes": 3, "most": 2, "levels": 2}, "b": {"codes": 2}, "c": {"codes": 2, "levels": 3}}
SLOTS = 8  # a1.1 a1.2 a2.1 a2.2 b c.1 c.2 c.3
COARSE = [0, 0, 2, 2, 4, 5, 5, 5]
SMALL = {"a": {"codes": 3, "levels": 2}, "b": {"codes": 2, "most": 2}}  # 36 plans


def case(sampler: str = "ema_vq", types=TYPES) -> tuple[UnifiedModel, Planner, Planner]:
    """Model, prior and posterior in float64, with maps so large that every choice matters."""
    torch.manual_seed(0)
    if sampler == "fsq":
        types = {name: t | {"codes": 4} for name, t in types.items()}
    model = UnifiedModel(tiny_causal(BASE), ConceptVocabulary(types, BASE), sampler).double().eval()
    for space in model.quantiser.spaces:
        torch.nn.init.normal_(space.to_point.weight, std=0.5)
        torch.nn.init.normal_(space.to_embedding.weight, std=0.5)
        if space.moving:
            torch.nn.init.normal_(space.codes)
    return model, Planner(model), Planner(model, "slots", model.quantiser)


# -- the layout --------------------------------------------------------------------------------------------------------


def test_each_level_is_a_slot_with_codes_of_its_own():
    v = ConceptVocabulary({"a": {"codes": 2, "most": 2, "levels": 2}, "b": {"codes": 3}}, 100)
    model = UnifiedModel(tiny_causal(100), v, "ema_vq")
    names = dict(enumerate(v.names(), 100))
    assert len(names) == v.new == len(model.new_table())
    chosen = model.layout.block(torch.tensor([[1, 2, 2, 1, 3]]))[0].tolist()
    assert " ".join(names[i] for i in chosen) == "<SEP_1> <a.1:0> <a.2:1> <a.1:1> <a.2:0> <EOS> <SEP_2> <b:2> <EOS>"
    assert [list(v.codes(k)) for k in range(2)] == [[108, 109, 110, 111], [112, 113, 114]]
    assert model.layout.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert model.layout.text_start == 6  # past the longest type, levels included
    assert (v.slot_types.tolist(), v.slot_levels.tolist()) == ([0, 0, 0, 0, 1], [0, 1, 0, 1, 0])
    assert v.level_slots == [[slice(0, 4, 2), slice(1, 4, 2)], [slice(4, 5, 1)]]
    probe = PlanProbe(Planner(model), AutoregressiveExecutor(model), None, "text")
    assert probe.slot_names == ["a1.1", "a1.2", "a2.1", "a2.2", "b"]


def test_nominal_bits_count_every_level():
    layout = case(types=SMALL)[0].layout
    assert len(every_plan(layout)) == 36
    assert layout.vocabulary.nominal_bits == pytest.approx(math.log2(36))
    assert not layout.vocabulary.possible[:, 0].any()  # no type may end early


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["fsq", "ema_vq"])
def test_the_choices_are_those_of_a_loop_over_texts_and_levels(sampler):
    model, _, posterior = case(sampler)
    plan = posterior.draw(*some_texts(20), Coder(model.quantiser))
    states, types = plan.rounds[0].states.detach(), model.vocabulary.types
    for row in range(20):
        found = []
        for t, space in zip(types, model.quantiser.spaces, strict=True):
            books = space.codes.numpy().reshape(t.levels, t.codes, -1)
            for _ in range(t.most):
                point = space.point(states[row, len(found)]).detach().numpy()  # of the state before the coarse slot
                for book in books:
                    nearest = int(np.argmin([((point - code) ** 2).sum() for code in book]))
                    found.append(1 + nearest)
                    point = point - book[nearest]
        assert plan.choices[row].tolist() == found
    assert len(torch.unique(plan.choices, dim=0)) > 5


@pytest.mark.parametrize("sampler", ["fsq", "ema_vq"])
def test_what_is_read_is_what_was_chosen(sampler):
    model, _, posterior = case(sampler)
    texts = some_texts(12)
    plan = posterior.draw(*texts, Coder(model.quantiser))
    ids, embeds = posterior.block(plan.choices)
    assert torch.equal(ids, plan.ids)
    assert_close(embeds, plan.embeds)
    assert_close(posterior.score(*texts, plan.choices), plan.logits)
    assert torch.equal(plan.logits.argmax(-1), plan.choices)
    together = posterior.score_many(*texts, torch.stack([plan.choices, plan.choices.flip(0)], 1))
    assert_close(together[:, 0], plan.logits)
    assert_close(together[:, 1], posterior.score(*texts, plan.choices.flip(0)))
    assert not torch.allclose(together[:, 1], plan.logits)  # a finer level is chosen given the coarser one


def test_the_first_level_is_that_of_a_space_of_one_level():
    """One level is the quantiser that there was before levels: the nearest code, straight through."""
    torch.manual_seed(0)
    one, two = (CodeSpace(5, 16, 1.0, "ema_vq", "codes", levels) for levels in (1, 2))
    two.load_state_dict({name: value for name, value in one.state_dict().items() if "weight" in name}, strict=False)
    torch.nn.init.normal_(two.codes)
    one.codes = two.codes[:5]
    state = torch.randn(7, 16)
    for found in (one(state, 0.3), two(state, 0.3)):
        point = state @ one.to_point.weight.T
        nearest = one.codes[(point.unsqueeze(1) - one.codes).square().sum(-1).argmin(-1)]
        assert_close(found.embeds, (point + 0.3 * (nearest - point)) @ one.to_embedding.weight.T)
    assert torch.equal(one(state, 0.3).embeds, two(state, 0.3).embeds)
    assert torch.equal(one(state, 0.3).logits, two(state, 0.3).logits)
    assert {name: tuple(value.shape) for name, value in one.state_dict().items()} == {
        **{"to_point.weight": (8, 16), "to_embedding.weight": (16, 8)},
        **{"codes": (5, 8), "counts": (5,), "sums": (5, 8)},
    }


def test_the_levels_of_a_lattice_tell_apart_as_many_points_as_their_product_by_hand():
    """Two steps a coordinate: the levels are +-1, +-1/2, +-1/4, and their sums are eight points, 1/2 apart."""
    space = CodeSpace(2, 16, 1.0, "fsq", "codes", 3)
    assert space.codes.flatten().tolist() == [-1.0, 1.0, -0.5, 0.5, -0.25, 0.25]
    sums = sorted(sum(codes) for codes in product(*(book.codes.flatten().tolist() for book in space.books)))
    assert sums == [-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75]


def test_the_embeddings_of_a_point_s_codes_add_up_to_that_of_their_sum():
    model, _, posterior = case()
    plan = posterior.draw(*some_texts(6), Coder(model.quantiser))
    space = model.quantiser.spaces[2]
    coarse, *finer = (book.codes[plan.choices[:, 5 + level] - 1] for level, book in enumerate(space.books))
    assert_close(plan.hard_embeds[:, 5:8].sum(1), space.to_embedding(coarse + sum(finer)))


# -- codes that follow their points ------------------------------------------------------------------------------------


def started(levels: int = 3) -> tuple[CodeSpace, torch.Tensor]:
    torch.manual_seed(0)
    space = CodeSpace(4, 16, 1.0, "ema_vq", "codes", levels).double()
    points = torch.randn(60, 8, generator=generator(), dtype=torch.float64) + 2.0
    space.begin(points, generator(1))
    return space, points


def test_after_a_start_each_level_leaves_less_and_its_codes_are_means_of_what_the_levels_before_left():
    space, points = started()
    left = residuals(points, [book.codes for book in space.books])
    errors = [float(part.square().sum()) for part in left]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.6 * errors[1]
    for part, book in zip(left, space.books, strict=False):
        own = (part.unsqueeze(1) - book.codes).square().sum(-1).argmin(-1)
        assert torch.bincount(own, minlength=4).tolist() == book.counts.tolist()
    coarse, finer, _ = (book.codes for book in space.books)
    swapped = residuals(points, [finer, coarse])[-1]  # the control: the second level quantises another level's residual
    assert float(swapped.square().sum()) > errors[2]


def test_each_level_follows_what_the_levels_before_left_by_hand():
    space, points = started(2)
    moved = points + 0.1
    before, decay = space.books, 0.9
    assert space.follow(moved, decay, generator()) == 0
    left = moved
    for old, new in zip(before, space.books, strict=True):
        own = (left.unsqueeze(1) - old.codes).square().sum(-1).argmin(-1)
        count = torch.stack([(own == v).sum() for v in range(4)]).double()
        total = torch.stack([left[own == v].sum(0) for v in range(4)])
        assert_close(new.counts, decay * old.counts + (1 - decay) * count)
        assert_close(new.sums, decay * old.sums + (1 - decay) * total)
        assert_close(
            new.codes, new.sums / new.counts.unsqueeze(-1), rtol=1e-4, atol=1e-6
        )  # counts are smoothed a little
        left = left - old.codes[own]


def test_dead_codes_of_every_level_start_anew_among_its_own_residuals():
    """Dead is a fiftieth of a level's points a code: .3 here."""
    space, points = started(2)
    for code, count in ((1, 0.0), (5, 0.25), (6, 0.4)):  # nobody is near them any more
        space.codes[code], space.counts[code], space.sums[code] = 1e3, count, 1e3 * count
    before = space.books[0].codes
    assert space.follow(points, 0.99, generator()) == 2
    of_levels = residuals(points, [before])
    for code, own in ((1, of_levels[0]), (5, of_levels[1])):
        assert (own - space.codes[code]).abs().sum(-1).min() < 1e-9
    assert (space.codes[6] > 900).all()


def test_a_quantiser_follows_the_points_of_coarse_slots():
    model, _, posterior = case()
    coder = Coder(model.quantiser)
    plan = posterior.draw(*some_texts(40), coder)
    assert sorted(coder.points) == sorted(set(COARSE))
    states, space = plan.rounds[0].states.detach(), model.quantiser.spaces[0]
    assert_close(coder.points[2], space.point(states[:, 2]).detach())
    model.quantiser.follow(coder.points, 0.99, generator(), begin=True)
    assert [float(book.counts.sum()) for book in space.books] == [80, 80]  # of both concepts
    points = torch.cat([coder.points[0], coder.points[2]])
    errors = [float(part.square().sum()) for part in residuals(points, [book.codes for book in space.books])]
    assert errors == sorted(errors, reverse=True)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["fsq", "ema_vq"])
def test_every_level_carries_the_gradient_to_the_state_before_its_coarse_slot_alone(sampler):
    """By hand: that of the point, as if nothing had been rounded and nothing taken off."""
    model, _, posterior = case(sampler)
    plan = posterior.draw(*some_texts(5), Coder(model.quantiser, 0.3))
    (_, states, moved), kinds = plan.rounds[0], model.vocabulary.slot_types
    pull = torch.randn(moved.shape, generator=generator(1), dtype=torch.float64)
    for slot in range(SLOTS):
        space, coarse = model.quantiser.spaces[kinds[slot]], COARSE[slot]
        (found,) = torch.autograd.grad((moved[:, slot] * pull[:, slot]).sum(), states, retain_graph=True)
        state = states[:, coarse].detach().requires_grad_()
        (by_hand,) = torch.autograd.grad((space.to_embedding(space.point(state)) * pull[:, slot]).sum(), state)
        assert_close(found[:, coarse], by_hand)
        assert by_hand.abs().min(-1).values.max() > 1e-6
        others = [other for other in range(SLOTS) if other != coarse]
        assert found[:, others].abs().max() == 0


def test_the_logits_of_a_finer_level_have_the_slope_of_finite_differences():
    """In the state, with the coarser choice held: a small step does not change it."""
    model, _, _ = case()
    quantiser = model.quantiser
    states = torch.randn(4, SLOTS, 16, generator=generator(), dtype=torch.float64)
    choices = 1 + torch.tensor([[0, 1, 2, 0, 1, 0, 1, 1]]).expand(4, -1)
    step = torch.randn(states.shape, generator=generator(1), dtype=torch.float64)
    log_q = [quantiser.logits(states + e * step, choices)[..., 1:3].softmax(-1) for e in (1e-5, -1e-5)]
    _, slope = torch.func.jvp(lambda s: quantiser.logits(s, choices)[..., 1:3].softmax(-1), (states,), (step,))
    assert_close((log_q[0] - log_q[1]) / 2e-5, slope, atol=1e-6, rtol=1e-5)
    assert (slope.abs().amax((0, 2)) > 1e-4).all()


def test_a_monitor_s_gradient_is_that_of_the_text_through_all_levels():
    model, _, posterior = case()
    watched, text = PosteriorGradient(), some_texts(5)
    plan = posterior.draw(*text, Coder(model.quantiser, 0.3))
    nll = token_nll(AutoregressiveExecutor(model).logits(plan.ids, plan.embeds, text[0]), text[0]).mean()
    (by_autograd,) = torch.autograd.grad(nll, plan.rounds[0].states, retain_graph=True)
    watched.watch_plan(plan)
    (nll + plan.logits.logsumexp(-1).mean()).backward()
    assert_close(watched.take().double(), by_autograd.flatten(1).norm(dim=1).sum(), rtol=1e-5, atol=0.0)
    for space in model.quantiser.spaces:
        assert space.to_point.weight.grad.abs().max() > 1e-6
        assert not space.codes.requires_grad


# -- probabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planning", ["sequential", "types", "slots"])
def test_the_probabilities_of_all_plans_sum_to_one(planning):
    model, _, posterior = case(types=SMALL)
    prior, (text, mask) = Planner(model, planning), some_texts(3)
    plans = every_plan(model.layout)
    for planner in (prior, posterior):
        for row in range(3):
            read = (part[row].expand(len(plans), -1) for part in (text, mask))
            assert_close(log_prob(planner, *read, plans).exp().sum(), torch.ones((), dtype=torch.float64))


def test_the_nll_of_a_plan_counts_the_choice_at_every_level():
    model, prior, _ = case()
    texts, plans = some_texts(4), torch.ones(4, SLOTS, dtype=torch.long)
    log_p = prior.score(*texts, plans).log_softmax(-1)
    nll = plan_nll(log_p, plans, model.layout.open_slots(plans))
    assert (nll > 0).all()
    by_hand = torch.stack([-log_p[:, slot, 1] for slot in range(SLOTS)], -1)
    assert_close(nll, by_hand)
    assert not torch.allclose(nll[:, 1], nll[:, 3])


def test_a_finer_choice_of_the_prior_depends_on_the_coarser_one():
    model, prior, _ = case()
    texts, plans = some_texts(4), torch.ones(4, SLOTS, dtype=torch.long)
    other = plans.clone()
    other[:, 0] = 2
    before, after = (prior.score(*texts, p) for p in (plans, other))
    assert_close(before[:, 0], after[:, 0])
    assert (before[:, 1] - after[:, 1]).abs().max() > 1e-3
    apart = Planner(model, "slots")
    assert_close(apart.score(*texts, plans), apart.score(*texts, other))  # where slots are apart, levels are, too


# -- searches ----------------------------------------------------------------------------------------------------------


def test_a_beam_as_wide_as_all_plans_lists_them_in_the_posterior_s_order():
    model, _, posterior = case(types=SMALL)
    text, mask = some_texts(3)
    plans = every_plan(model.layout)
    found = beam(posterior, text, mask, len(plans))
    for row in range(3):
        read = (part[row].expand(len(plans), -1) for part in (text, mask))
        chances = log_prob(posterior, *read, plans)
        assert torch.equal(torch.unique(found[row], dim=0), torch.unique(plans, dim=0))
        assert torch.equal(found[row], plans[chances.argsort(descending=True)])
    drawn = posterior.draw(text, mask, Coder(model.quantiser)).choices
    assert torch.equal(beam(posterior, text, mask, 1)[:, 0], drawn)  # the nearest code at each level


def test_levels_are_chosen_coarse_to_fine():
    _, prior, posterior = case()
    assert posterior.independent_slots() == [[0, 2, 4, 5], [1, 3, 6], [7]]
    assert prior.independent_slots() == [[slot] for slot in range(SLOTS)]


# -- losses ------------------------------------------------------------------------------------------------------------


def test_usage_is_of_each_level_s_codes_and_a_concept_counts_once():
    model, prior, posterior = case()
    texts = some_texts(9)
    plan = posterior.draw(*texts, Coder(model.quantiser))
    raw = plan_terms(plan, prior.score(*texts, plan.choices), model.vocabulary, tokens=4, floor=0.0, quota=None)
    p = plan.logits.softmax(-1)
    books = [([0, 2], 3), ([1, 3], 3), ([4], 2), ([5], 2), ([6], 2), ([7], 2)]
    by_hand = [usage_kl(p[:, slots, 1 : 1 + codes].flatten(0, 1)) for slots, codes in books]
    assert_close(raw["usage"], torch.stack(by_hand).mean())
    assert raw["concepts"] == 4  # two of a, b and c


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"levels": 0}, r"module\.types\.a\.levels=0 must be at least 1"),
        ({"levels": None}, r"module\.types\.a\.levels=None must be at least 1"),
        (
            {"levels": 2, "most": 2, "least": 1},
            r"a\.levels=2 needs a fixed number .* type module\.types\.a\.least=null",
        ),
    ],
)
def test_mistakes_in_levels_are_named(change, sentence):
    with pytest.raises(UsageError, match=sentence):
        ConceptVocabulary({"a": {"codes": 2} | change}, 10)


def test_what_has_no_levels_refuses_them():
    vocabulary = ConceptVocabulary(SMALL, BASE)
    with pytest.raises(UsageError, match=r"a\.levels=2 .*gumbel_st has none of; type module\.sampler=ema_vq"):
        UnifiedModel(tiny_causal(BASE), vocabulary, "gumbel_st")
    with pytest.raises(UsageError, match=r"a\.levels=2 .*signal_codes=true .* type module\.types\.a\.levels=1"):
        UnifiedModel(tiny_causal(BASE), vocabulary, "ema_vq", ["a"])
    UnifiedModel(tiny_causal(BASE), vocabulary, "ema_vq", ["b"])
    model = case(types=SMALL)[0]
    for planning in ("sequential", "types"):
        with pytest.raises(UsageError, match=rf"type module\.planning\.posterior=slots \(not {planning}\)"):
            Planner(model, planning, model.quantiser)
        Planner(model, planning)
    with pytest.raises(UsageError, match=r"module\.code=hash .* type module\.types\.a\.levels=1"):
        FixedPlanOptions(code="hash", types=SMALL)
    assert FixedPlanOptions(code="leading", types=SMALL).tokens == 2  # these types are not used
