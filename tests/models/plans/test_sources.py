"""Fixed codes of a response as the choices of a plan; the prompt does not count."""

from types import SimpleNamespace

import pytest
import torch

from models.plans.sources import FixedPlans

IDS = torch.tensor([[3, 3, 3, 1, 2, 1], [0, 0, 2, 2, 0, 3]])
BATCH = {"input_ids": IDS, "response_mask": torch.tensor([[False, False, True, True, True, True]] * 2)}


def fixed_plans(code) -> FixedPlans:
    vocabulary = SimpleNamespace(base=4, slot_codes=torch.tensor([2, 3]))
    planner = SimpleNamespace(layout=SimpleNamespace(vocabulary=vocabulary), certain=lambda choices: choices)
    return FixedPlans(planner, code, tokens=2)


def test_choices_of_leading_tokens():
    assert fixed_plans("leading").choices(BATCH).tolist() == [[4, 2], [3, 3]]


def test_choices_of_surprising_tokens():
    plans = fixed_plans("surprisal")
    plans.fit(torch.tensor([[0, 0, 0, 1, 1, 3, 3, 3, 3]]))
    assert plans.choices(BATCH).tolist() == [[2, 3], [3, 3]]


def test_choices_of_hashes():
    many = torch.arange(200).view(50, 4)
    batch = {"input_ids": many, "response_mask": torch.ones_like(many, dtype=torch.bool)}
    choices = fixed_plans("hash").choices(batch)
    assert choices.amin(0).tolist() == [1, 1]
    assert choices.amax(0).tolist() == [2, 3]


@pytest.mark.parametrize("code", ["leading", "hash"])
def test_a_drawn_plan_is_the_certain_one(code):
    plans = fixed_plans(code)
    plan, points = plans.draw(BATCH, None, None)
    assert torch.equal(plan, plans.choices(BATCH))
    assert points == {}
    assert torch.equal(plans.without_signals(BATCH), plan)
