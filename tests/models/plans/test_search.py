"""Searches find the true best plan where all can be listed; beams are exact where they must be."""

import pytest
import torch
from helpers.concept import BASE, concept_parts, every_plan, generator, log_prob, some_texts
from torch.testing import assert_close

from models.functional.bits_per_byte import token_nll
from models.plans.planner import Planner, greedy
from models.plans.search import PlanSearch, beam


def search_case(planning: str = "sequential", **options):
    model, prior, executor = concept_parts()
    posterior = Planner(model, planning)
    search = PlanSearch(prior, posterior, executor, **options)
    (prompt, prompt_mask), (text, _) = some_texts(3), some_texts(3, 5)
    whole = torch.cat([prompt, text], 1), torch.ones(3, 9, dtype=torch.bool)
    return search, (prompt, prompt_mask), whole, text


def all_scores(search, prompt, text) -> tuple[torch.Tensor, torch.Tensor]:
    """Every plan (N, S), and S(z) of each for every text, (B, N), text by text and without the search."""
    plans, rows = every_plan(search.prior.layout), []
    with torch.no_grad():
        for ids, mask, said in zip(*prompt, text, strict=True):
            many = said.expand(len(plans), -1)
            log_text = -token_nll(search.executor.logits(*search.prior.block(plans), many), many).sum(-1)
            log_plan = log_prob(search.prior, ids.expand(len(plans), -1), mask.expand(len(plans), -1), plans)
            rows.append(log_text + search.prior_weight * log_plan)
    return plans, torch.stack(rows)


def none_before(text: torch.Tensor, search) -> tuple[torch.Tensor, torch.Tensor]:
    slots = len(search.prior.layout.slot_columns)
    return torch.zeros(len(text), slots, dtype=torch.long), torch.zeros(len(text), dtype=torch.bool)


@pytest.mark.parametrize("prior_weight", [0.0, 1.0])
def test_a_search_among_all_plans_finds_the_best(prior_weight):
    search, prompt, whole, text = search_case(candidates=1014, explore=0.0, prior_weight=prior_weight)
    plans, scores = all_scores(search, prompt, text)
    found = search(prompt, whole, text, *none_before(text, search), generator())
    assert torch.equal(found.choices, plans[scores.argmax(-1)])
    best = scores.topk(2).values
    assert_close(found.scores, best[:, 0])
    assert_close(found.margins, best[:, 0] - best[:, 1])
    assert found.gaps.isnan().all()
    likely = search.posterior.draw(*whole, greedy).choices
    assert not torch.equal(found.choices, likely)  # the control: the posterior alone does not find it


def test_searching_again_and_again_climbs_to_the_best():
    """Few candidates: each search is no worse than the one before, and exploring gets to the top of all plans."""
    search, prompt, whole, text = search_case(candidates=8, explore=0.75)
    _, scores = all_scores(search, prompt, text)
    plans, known = none_before(text, search)
    noise, last = generator(1), torch.full((3,), -torch.inf, dtype=torch.float64)
    for _ in range(40):
        found = search(prompt, whole, text, plans, known, noise)
        assert (found.scores >= last - 1e-6).all()
        if known.all():
            assert_close(found.gaps, found.scores - last, atol=1e-5, rtol=0)
        plans, known, last = found.choices, torch.ones_like(known), found.scores
    assert (scores.amax(-1) - last).max() < 0.5 * (scores.amax(-1) - scores.mean(-1)).min()
    still = PlanSearch(search.prior, search.posterior, search.executor, candidates=8, explore=0.0)
    first = still(prompt, whole, text, *none_before(text, search), generator())
    again = still(prompt, whole, text, first.choices, known, generator())
    assert torch.equal(first.choices, again.choices)  # the control: without exploring nothing new is seen


@pytest.mark.parametrize("planning", ["sequential", "types", "slots"])
def test_a_beam_as_wide_as_all_plans_lists_them_in_order(planning):
    model, _, _ = concept_parts()
    planner, (text, mask) = Planner(model, planning), some_texts(2)
    plans = every_plan(planner.layout)
    with torch.no_grad():
        chances = torch.stack(
            [
                log_prob(planner, t.expand(len(plans), -1), m.expand(len(plans), -1), plans)
                for t, m in zip(text, mask, strict=True)
            ]
        )
    found = beam(planner, text, mask, len(plans))
    for row in range(2):
        assert torch.equal(torch.unique(found[row], dim=0), torch.unique(plans, dim=0))
        assert torch.equal(found[row, :5], plans[chances[row].topk(5).indices])


def test_a_beam_over_slots_apart_from_each_other_is_exact_at_any_width():
    model, _, _ = concept_parts({"a": {"codes": 3, "most": 2}, "b": {"codes": 4}})
    planner, (text, mask) = Planner(model, "slots"), some_texts(24)
    whole = beam(planner, text, mask, 36)
    assert torch.equal(beam(planner, text, mask, 5), whole[:, :5])
    sequential = Planner(model)
    wide, narrow = (beam(sequential, text, mask, width) for width in (36, 2))
    assert not torch.equal(narrow, wide[:, :2])  # the control: elsewhere a narrow beam may miss the best


def test_neighbours_differ_in_one_slot_and_are_plans():
    search, *_ = search_case()
    plans = every_plan(search.prior.layout)
    moved = search.neighbour(plans, generator())
    known = {tuple(plan) for plan in plans.tolist()}
    assert all(tuple(plan) in known for plan in moved.tolist())
    changed = (moved != plans).sum(-1)
    assert changed.float().mean() > 0.4
    assert (
        changed[(moved != 0).sum(-1) == (plans != 0).sum(-1)] <= 1
    ).all()  # more only where an end cuts concepts off


def test_rows_are_scored_on_their_own():
    search, prompt, _, text = search_case()
    plans = every_plan(search.prior.layout)[::200].expand(3, -1, -1)
    together = search.scores(prompt, text, plans)
    for row in range(3):
        alone = search.scores(tuple(part[row : row + 1] for part in prompt), text[row : row + 1], plans[row : row + 1])
        assert_close(alone[0], together[row])
    assert text.max() < BASE
