"""What monitors and a bag of words read of a plan."""

import torch
from helpers.concept import concept_parts, every_plan
from torch.testing import assert_close

from models.interfaces.probe_batch import ProbeBatch
from models.plans.bag import BagOfWords
from models.plans.probe import PlanProbe


def probe_of(planner, executor) -> PlanProbe:
    return PlanProbe(planner, executor, source=None, posterior_reads="text")


def test_slots_are_named_after_their_type_and_numbered_where_it_has_several():
    assert probe_of(*concept_parts()[1:]).slot_names == ["a1", "a2", "b", "c1", "c2", "c3"]


def test_plans_are_as_far_apart_as_they_have_different_slots():
    plans = every_plan(concept_parts()[1].layout)[:40]
    batch = ProbeBatch(plans, torch.ones_like(plans, dtype=torch.bool), {"choices": plans})
    features = probe_of(*concept_parts()[1:]).condition_features(batch)
    differ = (plans.unsqueeze(0) != plans.unsqueeze(1)).sum(-1)
    assert_close(torch.cdist(features, features).square(), 2.0 * differ.double())


def test_a_bag_of_words_is_linear_in_the_embeddings_at_the_slots_and_reads_no_other_column():
    model, planner, _ = concept_parts()
    bag, slots = BagOfWords(model), planner.layout.slot_columns.tolist()
    embeds = torch.randn(2, len(planner.layout.position_ids), 16, dtype=torch.float64, requires_grad=True)
    logits = bag(embeds)
    assert logits.shape == (2, 11)
    weight = bag.head.weight.view(11, len(slots), 16)
    assert_close(logits, torch.einsum("bsd,vsd->bv", embeds[:, slots], weight) + bag.head.bias)
    logits.sum().backward()
    assert embeds.grad.abs().sum((0, 2)).nonzero().flatten().tolist() == slots


def test_a_slot_stops_where_its_type_has_ended():
    _, planner, _ = concept_parts()
    plans = every_plan(planner.layout)
    assert torch.equal(planner.certain(plans).stops, (plans == 0).double())
