"""Steps with a cache equal whole forwards; padding moves nothing; the executor knows the plan alone; draws are exact."""

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.concept import BASE, TYPES, concept_parts, every_plan, generator, log_prob, some_texts
from torch.testing import assert_close

from models.backbones.causal_lm import with_adapters
from models.functional.gumbel import sample_categorical
from models.interfaces.executor import greedy_texts
from models.plans.planner import Planner, greedy, relaxed, sampled
from models.plans.unified import UnifiedModel
from models.plans.vocabulary import ConceptVocabulary

# -- planner ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_drawing_step_by_step_equals_scoring_at_once(architecture):
    _, planner, _ = concept_parts(architecture=architecture)
    text, mask = some_texts(16)
    plan = planner.draw(text, mask, relaxed(generator(), 1.0))
    assert not plan.open_slots.all()
    assert plan.open_slots.any(0).all()  # every slot is reached by some row and left out by others
    scored = planner.score(text, mask, plan.choices)
    assert_close(plan.logits[plan.open_slots], scored[plan.open_slots], rtol=1e-6, atol=1e-6)
    ids, embeds = planner.block(plan.choices)
    assert torch.equal(ids, plan.ids)
    assert_close(embeds[ids != planner.layout.vocabulary.pad], plan.embeds[ids != planner.layout.vocabulary.pad])


def test_the_probabilities_of_all_plans_sum_to_one_and_draws_follow_them():
    _, planner, _ = concept_parts()
    plans, (text, mask) = every_plan(planner.layout), some_texts(1)
    assert len(plans) == (1 + 3 + 9) * 2 * (3 + 9 + 27)
    with torch.no_grad():
        chances = log_prob(planner, text.expand(len(plans), -1), mask.expand(len(plans), -1), plans).exp()
        assert chances.sum() == pytest.approx(1, abs=1e-6)
        many, seen = text.expand(6000, -1), mask.expand(6000, -1)
        drawn = planner.draw(many, seen, sampled(generator())).choices
        colder = planner.draw(many, seen, sampled(generator(), 0.5)).choices
    index = {tuple(plan): k for k, plan in enumerate(plans.tolist())}

    def distance(sample):
        counts = torch.zeros(len(plans))
        for plan in sample.tolist():
            counts[index[tuple(plan)]] += 1
        return (counts / counts.sum() - chances).abs().sum() / 2

    floor = (
        torch.multinomial(chances, 6000, True, generator=generator(1)).bincount(minlength=len(plans)) / 6000
    ) - chances
    assert distance(drawn) < 1.4 * floor.abs().sum() / 2
    assert distance(colder) > 2 * floor.abs().sum() / 2  # the control


def test_padding_on_either_side_changes_nothing():
    _, planner, _ = concept_parts()
    text, mask = some_texts(4)
    choices = every_plan(planner.layout)[::250][:4]
    plain = planner.score(text, mask, choices)
    filler, none = torch.full((4, 3), 5), torch.zeros(4, 3, dtype=torch.bool)
    left = planner.score(torch.cat([filler, text], 1), torch.cat([none, mask], 1), choices)
    right = planner.score(torch.cat([text, filler], 1), torch.cat([mask, none], 1), choices)
    assert_close(left, plain)
    assert_close(right, plain)
    moved = planner.score(torch.cat([filler, text], 1), torch.cat([~none, mask], 1), choices)
    assert (moved - plain).abs().max() > 1e-2  # the control: real tokens there do change it
    padded = planner.draw(torch.cat([filler, text], 1), torch.cat([none, mask], 1), greedy)
    assert torch.equal(padded.choices, planner.draw(text, mask, greedy).choices)


def test_a_plan_of_nothing_but_the_prompt_needs_no_prompt():
    _, planner, _ = concept_parts()
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert planner.draw(empty, empty.bool(), greedy).choices.shape == (2, 6)


def test_the_gradient_reaches_the_planner_through_the_straight_through_block_alone():
    model, planner, executor = concept_parts()
    text, mask = some_texts(6)

    def slope(straight: bool):
        plan = planner.draw(text, mask, relaxed(generator(), 1.0))
        embeds = plan.embeds if straight else planner.block(plan.choices)[1]
        nll = -executor.logits(plan.ids, embeds, text).log_softmax(-1).gather(-1, text.unsqueeze(-1)).mean()
        (grad,) = torch.autograd.grad(nll, model.new_head.weight, allow_unused=True)
        return grad

    assert slope(True).abs().max() > 1e-4
    assert slope(False) is None


# -- executor --------------------------------------------------------------------------------------------------------


def executor_case(rows: int = 6):
    model, planner, executor = concept_parts()
    text, mask = some_texts(rows)
    with torch.no_grad():
        plan = planner.draw(text, mask, sampled(generator()))
    return model, planner, executor, text, mask, plan


def test_saying_step_by_step_equals_reading_at_once():
    _, _, executor, _, _, plan = executor_case()
    said = greedy_texts(executor, plan.ids, plan.embeds, 5, BASE)
    with torch.no_grad():
        logits = executor.logits(plan.ids, plan.embeds, said)
    assert torch.equal(logits.argmax(-1), said)
    assert len(torch.unique(said, dim=0)) > 1
    # a sampled text needs equal probabilities, not only equal orders: the same noise must give the same words
    noisy = executor.generate(plan.ids, plan.embeds, 5, generator(3), temperature=1.0)
    with torch.no_grad():
        logits, noise = executor.logits(plan.ids, plan.embeds, noisy), generator(3)
    again = torch.stack([sample_categorical(logits[:, place], 1.0, noise) for place in range(5)], -1)
    assert torch.equal(again, noisy)


def test_given_the_plan_the_prompt_changes_nothing():
    """The same plan beside any prompt: equal logits. Another plan: others."""
    _, planner, executor, text, mask, plan = executor_case(2)
    ids, embeds = planner.block(plan.choices)
    with torch.no_grad():
        plain, same = executor.logits(ids, embeds, text), iter(plan.hard.split(1, 1))
        other_prompt = planner.draw((text - 3 + 4) % (BASE - 3) + 3, mask, lambda _: greedy(next(same)))
        assert torch.equal(other_prompt.choices, plan.choices)
        assert_close(executor.logits(other_prompt.ids, other_prompt.embeds, text), plain)
        changed = plan.choices.clone()
        changed[:, 2] = 3 - changed[:, 2]
        assert (executor.logits(*planner.block(changed), text) - plain).abs().max() > 1e-3


def test_lengths_of_types_do_not_move_the_text():
    """A block with more padded columns for the same plan gives the same logits."""
    _, planner, executor, text, _, _ = executor_case(2)
    short = torch.tensor([[0, 0, 1, 2, 0, 0], [0, 0, 2, 3, 0, 0]])
    ids, embeds = planner.block(short)
    plain = executor.logits(ids, embeds, text)
    keep = ids[0] != planner.layout.vocabulary.pad
    columns = planner.layout.of_block(ids)
    squeezed = type(columns)(*(field[:, keep] for field in columns))
    executor.layout.of_block = lambda _: squeezed
    assert_close(executor.logits(ids[:, keep], embeds[:, keep], text), plain)


def test_a_concept_is_never_said():
    """Even where the concepts' own heads shout: text has no logits for them."""
    model, _, executor, _, _, plan = executor_case()
    with torch.no_grad():
        model.new_head.weight.fill_(100.0)
        assert executor.model.text_logits(torch.ones(1, 1, 16, dtype=torch.float64)).shape[-1] == BASE
        said = executor.generate(plan.ids, plan.embeds, 40, generator(), temperature=5.0)
        few = executor.generate(plan.ids, plan.embeds, 40, generator(), temperature=5.0, vocab_size=6)
    assert said.max() == BASE - 1  # every word of the text, and nothing beyond
    assert few.max() == 5


def test_blanks_hide_words_and_nothing_else():
    _, _, executor, text, _, plan = executor_case()
    blank = torch.zeros_like(text, dtype=torch.bool)
    with torch.no_grad():
        plain = executor.logits(plan.ids, plan.embeds, text)
        assert torch.equal(executor.logits(plan.ids, plan.embeds, text, blank), plain)
        blank[:, 1] = True
        hidden = executor.logits(plan.ids, plan.embeds, text, blank)
        swapped = text.clone()
        swapped[:, 1] = (text[:, 1] - 2) % (BASE - 3) + 3
        assert_close(executor.logits(plan.ids, plan.embeds, swapped, blank), hidden)
    assert_close(hidden[:, :2], plain[:, :2])
    assert (hidden[:, 2:] - plain[:, 2:]).abs().max() > 1e-3


# -- backbone --------------------------------------------------------------------------------------------------------


def test_text_without_concepts_is_what_the_backbone_says():
    backbone = tiny_causal(BASE).double()
    model = UnifiedModel(backbone, ConceptVocabulary(TYPES, BASE)).eval()
    text, mask = some_texts()
    columns = model.layout.of_text(mask)
    with torch.no_grad():
        states = model.states(model.embed(text, columns.type_ids), columns)
        assert_close(model.text_logits(states), backbone(input_ids=text).logits, rtol=1e-6, atol=1e-6)


def test_adapters_train_beside_the_new_tables():
    backbone = with_adapters(tiny_causal(BASE), 2)
    model = UnifiedModel(backbone, ConceptVocabulary(TYPES, BASE))
    text, mask = some_texts()
    Planner(model).score(text, mask, torch.ones(5, 6, dtype=torch.long)).exp().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "new_embedding.weight" in moved
    assert all("lora_" in name or name.startswith(("new_", "type_")) for name in moved)
    assert any("lora_B" in name for name in moved)
