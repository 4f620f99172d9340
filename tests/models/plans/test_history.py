"""Earlier plans are found by row, whatever batches and ranks they came in."""

import torch

from models.plans import history
from models.plans.history import PlanHistory


def test_plans_are_previous_once_the_validation_has_ended():
    plans, found = torch.tensor([[1, 2], [3, 4], [5, 6]]), PlanHistory()
    found.add(torch.tensor([0, 2]), plans[[0, 2]])
    found.add(torch.tensor([1]), plans[[1]])
    assert found.previous(torch.tensor([0])) is None
    found.close(slots=2)
    assert torch.equal(found.previous(torch.tensor([2, 1])), plans[[2, 1]])
    assert found.previous(torch.tensor([2, 3])) is None
    found.add(torch.tensor([1]), torch.tensor([[7, 8]]))
    found.close(slots=2)
    assert found.previous(torch.tensor([1])).tolist() == [[7, 8]]
    assert found.previous(torch.tensor([0, 1])) is None  # row 0 was not in the last validation


def test_ranks_share_what_they_found(monkeypatch):
    """One rank had a row, the other had none in its share of the last batch."""
    first, second, sent = PlanHistory(), PlanHistory(), []
    first.add(torch.tensor([0]), torch.tensor([[1, 2]]))
    monkeypatch.setattr(history, "gathered", lambda own: sent.append(own) or own)
    first.close(slots=2)
    second.close(slots=2)
    assert second.choices is None
    everyone = {name: torch.cat([own[name] for own in sent]) for name in ("rows", "choices")}
    monkeypatch.setattr(history, "gathered", lambda own: everyone)
    second.close(slots=2)
    assert second.previous(torch.tensor([0])).tolist() == [[1, 2]]
