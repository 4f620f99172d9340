"""Types side by side and slots at once: equal to the sequential form where they must be, and apart where they must not."""

import pytest
import torch
from helpers.concept import TYPES, concept_parts, every_plan, generator, log_prob, some_texts
from torch.testing import assert_close

from models.functional.errors import UsageError
from models.plans.layout import joined
from models.plans.planner import Planner, greedy, relaxed, sampled

ONE_TYPE = {"a": {"codes": 4, "most": 3, "least": 1}}
ONE_SLOT_EACH = {"a": {"codes": 3}, "b": {"codes": 4}, "c": {"codes": 2}}


def planners(types=TYPES, **options):
    model, sequential, _ = concept_parts(types, **options)
    return sequential, Planner(model, "types"), Planner(model, "slots")


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_one_type_beside_no_other_is_planned_as_in_sequence(architecture):
    sequential, types, _ = planners(ONE_TYPE, architecture=architecture)
    text, mask = some_texts(8)
    plans = [planner.draw(text, mask, relaxed(generator(), 1.0)) for planner in (sequential, types)]
    for one, other in zip(*plans, strict=True):
        assert_close(one, other)
    choices = plans[0].choices
    assert_close(sequential.score(text, mask, choices), types.score(text, mask, choices))


def test_types_of_one_slot_are_planned_at_once_as_side_by_side():
    _, types, slots = planners(ONE_SLOT_EACH)
    text, mask = some_texts(8)
    plans = [planner.draw(text, mask, sampled(generator())) for planner in (types, slots)]
    for one, other in zip(*plans, strict=True):
        assert_close(one, other)
    assert len(torch.unique(plans[0].choices, dim=0)) > 1


def test_each_type_is_what_it_would_be_alone_after_the_text():
    """The oracle: one forward for each type over [text, its own block], plainly causal."""
    _, types, _ = planners()
    model, layout, (text, mask) = types.model, types.layout, some_texts(6)
    choices = every_plan(layout)[::170][:6]
    together = types.score(text, mask, choices)
    opening, block = types._opening(text, mask), types._embedded(layout.block(choices))
    for kind in range(1, len(TYPES) + 1):
        own = (layout.type_ids == kind).nonzero().flatten()
        columns = joined(opening[1], block[1].take(own))
        states = model.states(torch.cat([opening[0], block[0][:, own]], 1), columns)
        for slot in (model.vocabulary.slot_types == kind - 1).nonzero().flatten().tolist():
            before = opening[0].shape[1] + int((own == layout.slot_columns[slot] - 1).nonzero())
            is_open = layout.open_slots(choices)[:, slot]
            assert_close(
                model.choice_logits(states[:, before : before + 1], [slot])[is_open, 0], together[is_open, slot]
            )


@pytest.mark.parametrize("planning", ["types", "slots"])
def test_who_looks_at_whom(planning):
    """Another type's concept changes nothing; an own earlier one only where types are planned in sequence."""
    sequential, types, slots = planners()
    planner, (text, mask) = {"types": types, "slots": slots}[planning], some_texts(2)
    choices = torch.tensor([[1, 2, 1, 1, 2, 3], [1, 2, 1, 1, 2, 3]])
    changed = choices.clone()
    changed[:, 0] = 3  # the first concept of type a
    own, others = 1, slice(2, None)
    before, after = (planner.score(text, mask, c) for c in (choices, changed))
    assert_close(before[:, others], after[:, others])
    assert torch.allclose(before[:, own], after[:, own]) == (planning == "slots")
    control = [sequential.score(text, mask, c)[:, others] for c in (choices, changed)]
    assert (control[0] - control[1]).abs().max() > 1e-3
    other_text = (text - 3 + 1) % 8 + 3
    assert (planner.score(other_text, mask, choices) - before).abs().max() > 1e-3


@pytest.mark.parametrize("planning", ["sequential", "types", "slots"])
def test_drawn_logits_are_scored_logits_and_plans_sum_to_one(planning):
    planner = Planner(concept_parts()[0], planning)
    text, mask = some_texts(12)
    plan = planner.draw(text, mask, relaxed(generator(), 1.0))
    assert_close(plan.logits[plan.open_slots], planner.score(text, mask, plan.choices)[plan.open_slots])
    plans = every_plan(planner.layout)
    with torch.no_grad():
        one = (part[:1].expand(len(plans), -1) for part in (text, mask))
        assert log_prob(planner, *one, plans).exp().sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("planning", ["types", "slots"])
def test_padding_moves_no_parallel_plan(planning):
    planner, (text, mask) = Planner(concept_parts()[0], planning), some_texts(4)
    filler, none = torch.full((4, 3), 5), torch.zeros(4, 3, dtype=torch.bool)
    plain = planner.draw(text, mask, greedy)
    for ids, seen in (((filler, text), (none, mask)), ((text, filler), (mask, none))):
        padded = planner.draw(torch.cat(ids, 1), torch.cat(seen, 1), greedy)
        assert_close(padded.logits, plain.logits)
        assert torch.equal(padded.choices, plain.choices)


@pytest.mark.parametrize("planning", ["sequential", "types", "slots"])
def test_a_drawn_block_carries_its_gradient_to_the_choices(planning):
    model, _, executor = concept_parts()
    planner, (text, mask) = Planner(model, planning), some_texts(6)
    plan = planner.draw(text, mask, relaxed(generator(), 1.0))
    ids, embeds = planner.block(plan.choices)
    assert torch.equal(ids, plan.ids)
    assert_close(plan.embeds, embeds)
    nll = -executor.logits(plan.ids, plan.embeds, text).log_softmax(-1).gather(-1, text.unsqueeze(-1)).mean()
    (slope,) = torch.autograd.grad(nll, model.new_head.weight)
    assert slope.abs().max() > 1e-4


@pytest.mark.parametrize("planning", ["sequential", "types", "slots"])
def test_a_text_read_once_serves_many_plans(planning):
    """As if it stood beside each of them, padding included."""
    planner, (text, mask) = Planner(concept_parts()[0], planning), some_texts(4)
    mask[1, :2] = False
    plans = every_plan(planner.layout)[torch.randperm(1014, generator=generator())[:12]].view(4, 3, 6)
    together = planner.score_many(text, mask, plans)
    alone = planner.score(*(part.repeat_interleave(3, 0) for part in (text, mask)), plans.flatten(0, 1))
    assert_close(together.flatten(0, 1), alone)
    if planning != "slots":
        assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3  # the control: the plans are not alike


def test_a_certain_plan_is_what_it_names():
    planner, (text, mask) = planners(ONE_SLOT_EACH)[0], some_texts(8)
    drawn = planner.draw(text, mask, sampled(generator()))
    certain = planner.certain(drawn.choices)
    for name in ("ids", "embeds", "choices", "open_slots", "hard", "hard_embeds"):
        assert_close(getattr(certain, name), getattr(drawn, name))
    assert (certain.logits.softmax(-1) == certain.hard).all()


def test_rounds_by_hand():
    """Types of 2, 1 and 3 slots; blocks of 4, 3 and 5 columns."""
    layout = concept_parts()[0].layout
    assert layout.slot_columns.tolist() == [1, 2, 5, 8, 9, 10]
    side_by_side = [(r.columns.tolist(), r.slots) for r in layout.rounds("types")]
    assert side_by_side == [([0, 4, 7], [0, 2, 3]), ([1, 8], [1, 4]), ([9], [5])]
    assert [(r.columns.tolist(), r.slots) for r in layout.rounds("slots")] == [([0, 1, 4, 7, 8, 9], [0, 1, 2, 3, 4, 5])]
    in_turn = [(r.columns.tolist(), r.slots) for r in layout.rounds("sequential")]
    assert in_turn == [([0], [0]), ([1], [1]), ([2, 3, 4], [2]), ([5, 6, 7], [3]), ([8], [4]), ([9], [5])]


def test_an_unknown_form_is_named():
    with pytest.raises(UsageError, match=r"module\.planning=both is not known; type one of sequential, types, slots"):
        Planner(concept_parts()[0], "both")
