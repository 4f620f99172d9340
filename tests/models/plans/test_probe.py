"""What monitors read of a planner-executor."""

from helpers.concept import concept_parts

from models.plans.probe import PlanProbe


def test_slots_are_named_after_their_type_and_numbered_where_it_has_several():
    _, planner, executor = concept_parts()
    probe = PlanProbe(planner, executor, source=None, posterior_reads="text")
    assert probe.slot_names == ["a1", "a2", "b", "c1", "c2", "c3"]
